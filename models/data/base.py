"""In-memory data with two modalities, labels and a three-way split; batches are built by indexing, not per item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SPLITS = {"train": 0, "valid": 1, "test": 2}


class Inputs(NamedTuple):
    """One modality of a batch: values [B, D], or padded [B, T, D] with lengths [B]."""

    values: Tensor
    lengths: Tensor | None = None


class Batch(NamedTuple):
    x1: Inputs
    x2: Inputs
    y: Tensor


@dataclass(frozen=True)
class Modality:
    """One modality of a data set: values [N, D], or ragged frames [sum T, D] with offsets [N + 1].

    ``shape`` keeps the image size of flattened pictures, for the augmentations.
    """

    name: str
    values: Tensor
    offsets: Tensor | None = None
    shape: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def dim(self) -> int:
        return self.values.shape[1]

    @property
    def is_sequence(self) -> bool:
        return self.offsets is not None

    def take(self, rows: Tensor) -> Inputs:
        """The given rows; sequences come zero-padded on the right to the longest one among them."""
        if self.offsets is None:
            return Inputs(self.values[rows])
        start = self.offsets[rows]
        lengths = self.offsets[rows + 1] - start
        steps = torch.arange(int(lengths.max()))
        valid = steps < lengths[:, None]
        index = (start[:, None] + steps).clamp(max=len(self.values) - 1)
        return Inputs(self.values[index] * valid[..., None], lengths)

    def rows_of_frames(self) -> Tensor:
        """For each frame (or row) the index of its sample."""
        if self.offsets is None:
            return torch.arange(len(self.values))
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())


@dataclass(frozen=True)
class PairedData:
    """Two aligned modalities, class labels y [N] and split codes [N] (0 train, 1 valid, 2 test)."""

    name: str
    first: Modality
    second: Modality
    y: Tensor
    split: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, split: str) -> Tensor:
        """Indices of one split. Raises ValueError for an unknown or empty split."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rows = torch.nonzero(self.split == SPLITS[split]).flatten()
        if len(rows) == 0:
            raise ValueError(f"data {self.name!r} has no {split} rows")
        return rows

    def batch(self, rows: Tensor) -> Batch:
        return Batch(self.first.take(rows), self.second.take(rows), self.y[rows])

    def standardised(self) -> PairedData:
        """Each feature centred and scaled with statistics of the training rows only."""
        train = self.split == SPLITS["train"]

        def scale(modality: Modality) -> Modality:
            frames = modality.values[train[modality.rows_of_frames()]].double()
            mean, std = frames.mean(0), frames.std(0, correction=0)
            std = torch.where(std > 1e-8, std, torch.ones_like(std))
            values = ((modality.values - mean) / std).to(torch.float32)
            return Modality(modality.name, values, modality.offsets, modality.shape)

        return PairedData(self.name, scale(self.first), scale(self.second), self.y, self.split, self.num_classes)

    def loader(self, split: str, batch_size: int, *, seed: int | None = None) -> DataLoader[Batch]:
        """Batches of one split; shuffled and without the incomplete last batch when a seed is given."""
        rows = self.rows(split)
        if seed is None:
            return DataLoader(_Rows(self, rows), batch_size, collate_fn=_same)
        if len(rows) < batch_size:
            raise ValueError(f"batch_size is {batch_size}, but {self.name!r} has only {len(rows)} {split} rows")
        sampler = EpochSampler(len(rows), seed)
        return DataLoader(_Rows(self, rows), batch_size, sampler=sampler, collate_fn=_same, drop_last=True)


class _Rows(Dataset[Batch]):
    def __init__(self, data: PairedData, rows: Tensor):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.data.batch(self.rows[torch.tensor(indices)])


def _same(batch: Any) -> Any:
    return batch


class EpochSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone, so that a resumed run sees the same batches."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return iter(order.tolist())


def stratified_split(y: np.ndarray, seed: int, fractions: tuple[float, float] = (0.6, 0.2)) -> np.ndarray:
    """Split codes [N], drawn per class: fractions are those of train and valid, the rest is test."""
    rng = np.random.default_rng(seed)
    split = np.full(len(y), SPLITS["test"], dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        train, valid = np.round(np.cumsum(fractions) * len(rows)).astype(int)
        split[rows[:train]] = SPLITS["train"]
        split[rows[train:valid]] = SPLITS["valid"]
    return split
