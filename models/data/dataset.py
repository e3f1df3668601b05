"""Data in memory: any number of modalities, labels and a three-way split; batches are built by indexing, not per item.

File formats and data sets are converted to this form. A source only builds Modalities and a Dataset with raw values;
``models.data.load`` standardises and checks them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.utils.data as torch_data
from torch import Tensor

from models.batch import Batch, Target
from models.data.modality import Modality

__all__ = ["SPLITS", "UNUSED", "Dataset", "EpochSampler", "Modality"]

SPLITS = {"train": 0, "valid": 1, "test": 2}
UNUSED = -1


@dataclass(frozen=True)
class Dataset:
    """Aligned modalities of N rows, their labels and their split.

    labels: int64 [N] class numbers from 0, or float [N] or [N, K] regression targets; None for Target.none().
    labelled: [N] bool; None if every row has a label. Labels of other rows may have any finite value.
    split: int64 [N], 0 train, 1 valid, 2 test, -1 unused.
    ids: a name per row, for messages and tables. groups: int64 [N], the speaker, subject or video of a row.
    Raises ValueError for inconsistent row counts, names, codes or dtypes.
    """

    name: str
    modalities: tuple[Modality, ...]
    labels: Tensor | None
    target: Target
    split: Tensor
    labelled: Tensor | None = None
    ids: tuple[str, ...] = ()
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        _check_rows(self)
        _check_labels(self)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, name: str) -> Modality:
        """The modality with this name. Raises KeyError that lists the existing ones."""
        for modality in self.modalities:
            if modality.name == name:
                return modality
        raise KeyError(f"data {self.name!r} has no modality {name!r}; it has {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(modality.name for modality in self.modalities)

    def has_rows(self, split: str) -> bool:
        return bool((self.split == _code(split)).any())

    def rows(self, split: str) -> Tensor:
        """Indices of one split. Raises ValueError for an unknown or empty split."""
        rows = torch.nonzero(self.split == _code(split)).flatten()
        if len(rows) == 0:
            raise ValueError(
                f"data {self.name!r} has no {split} rows: its split has no code {SPLITS[split]}, or there are too "
                "few rows for a random split (it needs about five of every class)"
            )
        return rows

    def labelled_rows(self, split: str) -> Tensor:
        """Indices of the labelled rows of one split. Raises ValueError if there are none."""
        rows = self.rows(split)
        if self.labels is None:
            raise ValueError(f"data {self.name!r} has no labels")
        rows = rows if self.labelled is None else rows[self.labelled[rows]]
        if len(rows) == 0:
            raise ValueError(f"data {self.name!r} has no labelled {split} rows")
        return rows

    def batch(self, rows: Tensor) -> Batch:
        labels = None if self.labels is None else self.labels[rows]
        labelled = None if self.labelled is None else self.labelled[rows]
        if labels is not None and labelled is not None:
            labels = labels.masked_fill(~(labelled if labels.dim() == 1 else labelled[:, None]), 0)
        return Batch({m.name: m.take(rows) for m in self.modalities}, labels, labelled, rows)

    def choose(self, names: Sequence[str]) -> Dataset:
        """The same rows with only these modalities, in this order. Raises ValueError for unknown or repeated names."""
        wrong = [name for name in names if name not in self.names]
        if wrong or len(set(names)) < len(names) or not names:
            raise ValueError(f"modalities must be different names out of {', '.join(self.names)}; got {list(names)}")
        return replace(self, modalities=tuple(self[name] for name in names))

    def select(self, rows: Tensor) -> Dataset:
        """Only the given rows (indices), in that order."""
        labels, labelled, groups = (None if t is None else t[rows] for t in (self.labels, self.labelled, self.groups))
        return replace(
            self,
            modalities=tuple(modality.select(rows) for modality in self.modalities),
            labels=labels,
            split=self.split[rows],
            labelled=labelled,
            ids=tuple(self.ids[int(row)] for row in rows) if self.ids else (),
            groups=groups,
        )

    def standardised(self) -> Dataset:
        """Each feature centred and scaled with the statistics of the training rows that have it.

        A feature whose deviation is below the resolution of its values in single precision (about 1e-7 of the largest
        value) counts as constant and is only centred. Pictures and tokens are unchanged.
        """
        train = self.split == SPLITS["train"]
        return replace(self, modalities=tuple(m.standardised(train) for m in self.modalities))

    def digest(self) -> str:
        """Hash of the values, labels and splits, which determine a result. Costs one pass over the data."""
        found = hashlib.sha256()
        for modality in self.modalities:
            found.update(repr((modality.name, tuple(modality.values.shape), modality.shape)).encode())
            for part in (modality.values, modality.offsets, modality.present, modality.table):
                found.update(b"-" if part is None else np.ascontiguousarray(part.numpy()).tobytes())
        for part in (self.labels, self.labelled, self.split):
            found.update(b"-" if part is None else np.ascontiguousarray(part.numpy()).tobytes())
        found.update(repr(self.target).encode())
        return found.hexdigest()

    def loader(
        self, split: str, batch_size: int, *, seed: int | None = None, labelled: bool = False
    ) -> torch_data.DataLoader[Batch]:
        """Batches of one split in order. With a seed they are shuffled, and an incomplete last batch is dropped.

        The permutation depends only on (seed, epoch). ``labelled`` excludes rows without a label.
        """
        rows = self.labelled_rows(split) if labelled else self.rows(split)
        if seed is None:
            return torch_data.DataLoader(_Rows(self, rows), batch_size, collate_fn=_same)
        if len(rows) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but {self.name!r} has only {len(rows)} {split} rows; "
                f"set training.batch_size to at most {len(rows)}"
            )
        sampler = EpochSampler(len(rows), seed)
        return torch_data.DataLoader(_Rows(self, rows), batch_size, sampler=sampler, collate_fn=_same, drop_last=True)


class _Rows(torch_data.Dataset[Batch]):
    def __init__(self, data: Dataset, rows: Tensor):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.data.batch(self.rows[torch.tensor(indices)])


def _same(batch: Any) -> Any:
    return batch


class EpochSampler(torch_data.Sampler[int]):
    """A permutation that depends only on (seed, epoch), so that a resumed run sees the same batches."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return iter(order.tolist())


def _code(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS[split]


def _check_rows(data: Dataset) -> None:
    number = len(data.split)
    if not data.modalities:
        raise ValueError(f"data {data.name!r} has no modality")
    if len(set(data.names)) < len(data.names):
        raise ValueError(f"modalities of {data.name!r} must have different names, got {', '.join(data.names)}")
    for modality in data.modalities:
        if len(modality) != number:
            raise ValueError(f"modality {modality.name!r} has {len(modality)} rows, split has {number}")
    known = torch.tensor([UNUSED, *SPLITS.values()])
    if data.split.dtype != torch.int64 or data.split.dim() != 1:
        raise ValueError(f"split must be int64 [N], got {data.split.dtype} {tuple(data.split.shape)}")
    wrong = data.split[~torch.isin(data.split, known)]
    if len(wrong):
        raise ValueError(f"split must hold the codes 0 train, 1 valid, 2 test, -1 unused; got {int(wrong[0])}")
    if data.ids and len(data.ids) != number:
        raise ValueError(f"ids must be {number}, one per row, got {len(data.ids)}")
    if data.groups is not None and (data.groups.shape != (number,) or data.groups.dtype != torch.int64):
        raise ValueError(f"groups must be int64 [{number}], got {data.groups.dtype} {tuple(data.groups.shape)}")


def _check_labels(data: Dataset) -> None:
    labels, target, number = data.labels, data.target, len(data)
    if (labels is None) != (target.kind == "none"):
        raise ValueError(f"labels must be given for a target of {target.kind!r}, and left out for 'none'")
    if data.labelled is not None and (data.labelled.shape != (number,) or data.labelled.dtype != torch.bool):
        raise ValueError(f"labelled must be bool [{number}], got {tuple(data.labelled.shape)}")
    if labels is None:
        return
    known = labels if data.labelled is None else labels[data.labelled]
    if target.is_classes:
        if labels.shape != (number,) or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 [{number}] for classes, got {labels.dtype} {tuple(labels.shape)}")
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < target.size:
            raise ValueError(
                f"labels must be classes 0 to {target.size - 1}, got {int(known.min())} to {int(known.max())}"
            )
        return
    shapes = ((number, target.size), (number,)) if target.size == 1 else ((number, target.size),)
    if tuple(labels.shape) not in shapes or not labels.is_floating_point():
        raise ValueError(f"labels must be float [{number}, {target.size}], got {labels.dtype} {tuple(labels.shape)}")
    if not bool(known.isfinite().all()):
        raise ValueError("labels must be finite where a row is labelled")
