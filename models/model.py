"""The protocol that every model follows, and what the trainer needs to know of it. Nothing here names a system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.batch import Batch, Target


class Loss(NamedTuple):
    """total: what is minimised. terms: detached, named as in the paper, their units in the model's docstring."""

    total: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def of(cls, terms: dict[str, Tensor], weights: dict[str, float] | None = None) -> Loss:
        """The weighted sum of terms (weight 1 where none is given)."""
        weighted = [value * (weights or {}).get(name, 1.0) for name, value in terms.items()]
        return cls(torch.stack(weighted).sum(), {name: value.detach() for name, value in terms.items()})


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's step size and weight decay; None leaves what the training settings say."""

    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Nested:
    """Another registered model as a setting: ``base: mfn`` or ``base: {name: mfn, memory: 32}`` in YAML."""

    name: str
    settings: Any


class Phase(NamedTuple):
    """One kind of step of the alternating optimisation.

    parameters: who is stepped; everybody else is frozen during the phase.
    loss: of a batch, or of what ``fixed`` made of it.
    steps: per batch.
    fixed: computes, once per batch and without gradient, what the phase holds fixed (features of frozen encoders).
    fresh: every step draws a batch of its own from the training rows, instead of the one that is at hand.
    usable: the rows that the loss can use, by default those that have every modality. A batch with fewer than two of
        them is skipped.
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
    """A model of a batch. The first phase's loss is the one that validation rows are scored with.

    views: augmented versions of the inputs that ``loss`` wants in ``batch.views``.
    headline: the representation that stands for the model in a table when it has no head.
    shown: representations that figures draw; empty for all of them.
    progress: share of the training's batches that are behind, 0 to 1; the trainer says it before every batch.
    """

    views: int = 0
    headline: str = "encoder"
    shown: tuple[str, ...] = ()
    progress: float = 1.0

    def phases(self) -> list[Phase]:
        raise NotImplementedError

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """What probes and figures see, [B, D] each; the keys are the paper's names."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> Tensor | None:
        """Scores [B, C] of classes or values [B, K] in the target's units; None when a probe speaks for the model."""
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
