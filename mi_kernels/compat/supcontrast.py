"""Replaces SupContrast's `losses.py`: `from mi_kernels.compat.supcontrast import SupConLoss`.

Differences:
* Features that are not normalised, or have one large entry, give a finite loss. The original subtracts the anchor's
  score with
  itself, all other exponentials underflow, and the loss is NaN.
* An anchor without a positive contributes 0 and counts in the mean, as in the current original. Older copies return
  NaN.
* 16-bit features give an fp32 loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import common, supcon
from ..ops.common.dtypes import accumulate_dtype

__all__ = ["SupConLoss"]

_HELD = 256 * 256


class SupConLoss(nn.Module):
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2), times temperature / base_temperature.

    features: [B, V, ...], V views of B items. Further dimensions are flattened; the caller normalises.
    labels: [B]; items with equal labels are positives. Or mask: [B, B], weights of the positives, possibly asymmetric,
        which may be learnable. Without both, the loss is SimCLR's.

    The mean is over all B V anchors (contrast_mode="all") or over the B first views ("one"). Cost: 3N with N = 2 (B
    V)^2 D FLOP, or 4N if an anchor has no positive, without stored scores. A mask adds 2 B^2 D FLOP for mask @
    features. On a CPU up to 256 x 256 scores are stored, because this is faster than the fixed cost of the operator;
    with a learnable mask all scores are. Raises ValueError that names the argument.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if labels is not None and mask is not None:
            raise ValueError("labels and mask cannot both be given")
        items = supcon.check_views(features, labels, self.base_temperature, self.contrast_mode, any_labels=True)
        features = features.flatten(2)
        views = features.shape[1]
        contrast = features.transpose(0, 1).flatten(0, 1)
        anchors = contrast if self.contrast_mode == "all" else contrast[:items]
        scale = common.inverse_temperature(self.temperature)
        if mask is not None and mask.shape != (items, items):
            raise ValueError(f"mask must have shape {(items, items)}, got {tuple(mask.shape)}")
        few = anchors.device.type == "cpu" and anchors.shape[0] * contrast.shape[0] <= _HELD
        if few or (mask is not None and mask.requires_grad):
            loss = _from_scores(anchors, contrast, _mask(labels, mask, anchors, items), views, scale)
        elif mask is None:
            if labels is None:
                classes = torch.arange(items, device=features.device)
            else:
                classes = torch.unique(labels.reshape(-1).to(features.device), return_inverse=True)[1]
            groups = (classes.repeat(anchors.shape[0] // items), classes.repeat(views))
            loss = supcon.class_mean(anchors, contrast, *groups, every=True, scale=scale)
        else:
            repeats = anchors.shape[0] // items
            towards, weight = supcon.masked_positives(features, mask.to(features.device), repeats)
            loss = supcon.weighted_mean(anchors, contrast, towards, weight, every=True, scale=scale)
        return self.temperature / self.base_temperature * loss


def _mask(labels: Tensor | None, mask: Tensor | None, like: Tensor, items: int) -> Tensor:
    """The weights of items as positives of each other, [B, B], in the accumulation type."""
    wide = accumulate_dtype(like.dtype)
    if mask is not None:
        return mask.to(like.device, wide)
    if labels is None:
        return torch.eye(items, dtype=wide, device=like.device)
    labels = labels.reshape(-1).to(like.device)
    return (labels[:, None] == labels).to(wide)


def _from_scores(anchors: Tensor, contrast: Tensor, mask: Tensor, views: int, scale: float | Tensor) -> Tensor:
    """The mean loss over the anchors from stored scores; anchor i is column i."""
    scores = anchors.to(mask.dtype) @ contrast.to(mask.dtype).mT * scale
    own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    positive = mask.repeat(scores.shape[0] // mask.shape[0], views).masked_fill(own, 0)
    weight = positive.sum(1, keepdim=True)
    weight = torch.where(weight > supcon.NONE, weight, torch.inf)  # no positive: a row of zeros
    target = positive / weight if mask.requires_grad else positive.div_(weight)
    # A finite minimum, because 0 times -inf is NaN.
    return F.cross_entropy(scores.masked_fill(own, -1e30), target)
