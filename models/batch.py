"""Batches: the inputs by modality, the labels, and a description of the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """One modality of a batch: vectors [B, D], sequences [B, T, D] or tokens [B, T] int64, padded on the right.

    lengths: [B] for sequences and tokens; None for vectors, and if no sequence is padded. Length 0 means that the
        modality is missing; the values of that row are zero.
    present: [B] bool, False for rows without this modality; None if every row has it.
    """

    values: Tensor
    lengths: Tensor | None = None
    present: Tensor | None = None

    def mask(self) -> Tensor:
        """[B] bool, True for rows that have this modality."""
        if self.present is not None:
            return self.present
        return torch.ones(len(self.values), dtype=torch.bool, device=self.values.device)

    def steps(self) -> Tensor:
        """[B] lengths of sequences and tokens, on the device of the values; the number of steps if no lengths are
        given."""
        if self.lengths is not None:
            return self.lengths.to(self.values.device)
        return torch.full((len(self.values),), self.values.shape[1], device=self.values.device)

    def take(self, rows: Tensor) -> Inputs:
        """The given rows (indices or a bool mask), with unchanged padding."""
        return Inputs(
            self.values[rows],
            None if self.lengths is None else self.lengths[rows],
            None if self.present is None else self.present[rows],
        )

    def to(self, *args: object) -> Inputs:
        """``Tensor.to`` for all parts; a floating-point dtype applies only to floating-point values."""
        return Inputs(*(None if part is None else _moved(part, args) for part in self))  # type: ignore[arg-type]


class Batch(NamedTuple):
    """Rows of a data set.

    inputs: by modality name, in the order of the data set.
    target: [B] int64 classes; [B] or [B, K] float regression targets; None without labels.
    labelled: [B] bool; None if every row has a label. ``target`` is 0 for rows without one.
    rows: [B] indices in the data set, which determine seeded noise and ids.
    views: ``Model.views`` augmented versions of ``inputs``, drawn by the trainer.
    """

    inputs: Mapping[str, Inputs]
    target: Tensor | None
    labelled: Tensor | None
    rows: Tensor
    views: tuple[Mapping[str, Inputs], ...] = ()

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def take(self, rows: Tensor) -> Batch:
        """The given rows (indices or a bool mask) of all fields."""

        def part(inputs: Mapping[str, Inputs]) -> dict[str, Inputs]:
            return {name: x.take(rows) for name, x in inputs.items()}

        target, labelled = (None if t is None else t[rows] for t in (self.target, self.labelled))
        return Batch(part(self.inputs), target, labelled, self.rows[rows], tuple(part(view) for view in self.views))

    def to(self, *args: object) -> Batch:
        """``Tensor.to`` for all fields; a floating-point dtype applies to the inputs and to regression targets."""

        def part(inputs: Mapping[str, Inputs]) -> dict[str, Inputs]:
            return {name: x.to(*args) for name, x in inputs.items()}

        target, labelled = (None if t is None else _moved(t, args) for t in (self.target, self.labelled))
        views = tuple(part(view) for view in self.views)
        return Batch(part(self.inputs), target, labelled, _moved(self.rows, args), views)

    def complete(self) -> Batch:
        """The rows that have every modality; the batch itself if all do."""
        masks = [x.present for x in self.inputs.values() if x.present is not None]
        if not masks:
            return self
        whole = torch.stack(masks).all(0)
        return self if bool(whole.all()) else self.take(whole)

    def with_labels(self) -> Batch:
        """The rows that have a label; the batch itself if all do."""
        if self.labelled is None or bool(self.labelled.all()):
            return self
        return self.take(self.labelled)

    def complete_with_labels(self) -> Batch:
        """The rows that have every modality and a label."""
        return self.complete().with_labels()


@dataclass(frozen=True)
class Target:
    """Describes the target, which determines the loss, metrics and probes.

    kind: "classes" with ``size`` classes; "regression" with ``size`` dimensions; "none" without labels.
    low, high: the range of a regression target, if it has one (MOSI: -3, 3).
    names: of the classes or dimensions; empty if they have none.
    """

    kind: str
    size: int = 0
    low: float | None = None
    high: float | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("classes", "regression", "none"):
            raise ValueError(f"kind must be classes, regression or none, got {self.kind!r}")
        if self.kind == "classes" and self.size < 2:
            raise ValueError(f"size must be at least 2 classes, got {self.size}")
        if self.kind == "regression" and self.size < 1:
            raise ValueError(f"size must be at least 1 dimension, got {self.size}")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.names and len(self.names) != self.size:
            raise ValueError(f"names must be {self.size}, one per class or dimension, got {len(self.names)}")

    @classmethod
    def classes(cls, number: int, names: tuple[str, ...] = ()) -> Target:
        return cls("classes", number, names=names)

    @classmethod
    def regression(
        cls, dims: int = 1, low: float | None = None, high: float | None = None, names: tuple[str, ...] = ()
    ) -> Target:
        return cls("regression", dims, low, high, names)

    @classmethod
    def none(cls) -> Target:
        return cls("none")

    @property
    def is_classes(self) -> bool:
        return self.kind == "classes"

    @property
    def is_regression(self) -> bool:
        return self.kind == "regression"


def _moved(part: Tensor, args: tuple[object, ...]) -> Tensor:
    kept = [arg for arg in args if part.is_floating_point() or not isinstance(arg, torch.dtype)]
    return part.to(*kept) if kept else part  # type: ignore[call-overload]
