"""The protocol of all models, which the trainer uses. It depends on no particular system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.batch import Batch, Target


class Loss(NamedTuple):
    """total: the value to minimise. terms: detached terms, named as in the paper; the model's docstring gives their
    units."""

    total: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def of(cls, terms: dict[str, Tensor], weights: dict[str, float] | None = None) -> Loss:
        """The weighted sum of terms; the default weight is 1."""
        weighted = [value * (weights or {}).get(name, 1.0) for name, value in terms.items()]
        return cls(torch.stack(weighted).sum(), {name: value.detach() for name, value in terms.items()})


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's learning rate and weight decay; None uses the training settings."""

    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Nested:
    """Another registered model as a setting: ``base: mfn`` or ``base: {name: mfn, memory: 32}`` in YAML."""

    name: str
    settings: Any


class Phase(NamedTuple):
    """One kind of step of the alternating optimisation.

    parameters: the parameters that the phase trains; all others are frozen during the phase.
    loss: a function of the batch, or of the result of ``fixed``.
    steps: number of steps per batch.
    fixed: computes once per batch, without gradients, the values that are constant in the phase (features of frozen
        encoders).
    fresh: every step draws its own batch of training rows instead of using the current batch.
    usable: selects the rows that the loss can use, by default those with every modality. A batch with fewer than two
        such rows is skipped.
    """

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[Any], Loss]
    steps: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    fixed: Callable[[Batch], Any] | None = None
    fresh: bool = False
    usable: Callable[[Batch], Batch] = Batch.complete


class Model(nn.Module):
    """Base class of all models. The loss of the first phase is also the validation loss.

    views: the number of augmented versions of the inputs that ``loss`` needs in ``batch.views``.
    headline: the representation that summary tables show if the model has no head.
    shown: representations that figures show; empty for all of them.
    progress: the fraction of training batches already processed, 0 to 1; the trainer sets it before every batch.
    """

    views: int = 0
    headline: str = "encoder"
    shown: tuple[str, ...] = ()
    progress: float = 1.0

    def phases(self) -> list[Phase]:
        raise NotImplementedError

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """The representations for probes and figures, [B, D] each, under the names of the paper."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> Tensor | None:
        """Class scores [B, C] or values [B, K] in the units of the target; None if the model has no head and is probed
        instead."""
        return None


def needs_classes(name: str, target: Target) -> None:
    """Raises ValueError unless the data has class labels."""
    if not target.is_classes:
        raise ValueError(
            f"{name} needs class labels, the data has a target of {target.kind!r}; data.threshold makes two classes "
            "of a regression target"
        )


def needs_several(name: str, names: tuple[str, ...]) -> None:
    """Raises ValueError unless the data has two modalities or more."""
    if len(names) < 2:
        raise ValueError(f"{name} needs two modalities or more, the data has {', '.join(names)}")
