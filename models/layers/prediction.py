"""What a head's outputs mean: class scores, or a regression target in units of its deviation over the training rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.data.dataset import Dataset
from models.layers.sequence import check_choice


class Scale(nn.Module):
    """Of a head that predicts the standardised target: its loss against the labels, and predictions in their units.

    loss: of a regression target, "l1" or "mse", in units of the training rows' deviation (squared for "mse"); classes
    have the cross entropy in nats. ``name`` is which of the three it is.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, data: Dataset, loss: str = "l1"):
        super().__init__()
        check_choice("loss", loss, ("l1", "mse"))
        self.target = data.target
        self.name = "cross_entropy" if data.target.is_classes else loss
        centre, scale = target_statistics(data)
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of outputs [B, K] against labels [B] or [B, K]."""
        return prediction_loss(self.name, outputs, labels, self.centre, self.scale)

    def predicted(self, outputs: Tensor) -> Tensor:
        """Outputs as scores of classes, or in the target's units."""
        return outputs if self.target.is_classes else outputs * self.scale + self.centre


def prediction_loss(name: str, outputs: Tensor, labels: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """The mean "cross_entropy" (nats) of outputs [B, K] and classes [B]; "l1" or "mse" against standardised labels."""
    if name == "cross_entropy":
        return nn.functional.cross_entropy(outputs, labels)
    wanted = (labels.reshape(len(outputs), -1).to(outputs) - centre) / scale
    function = nn.functional.l1_loss if name == "l1" else nn.functional.mse_loss
    return function(outputs, wanted)


def target_statistics(data: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and deviation [K] of a regression target over the labelled training rows; 0 and 1 otherwise."""
    if not data.target.is_regression or data.labels is None:
        return torch.zeros(1), torch.ones(1)
    labels = data.labels[data.labelled_rows("train")].double().reshape(-1, data.target.size)
    scale = labels.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return labels.mean(0).float(), scale.float()
