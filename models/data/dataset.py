"""Data in memory: any number of modalities, labels and a three-way split; batches are built by indexing, not per item.

This is what a file format or a data set is turned into. A source builds Modalities and a Dataset with raw values and
calls nothing else; ``models.data.load`` standardises and checks.
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

from models.batch import Batch, Inputs, Target

SPLITS = {"train": 0, "valid": 1, "test": 2}
UNUSED = -1


@dataclass(frozen=True)
class Modality:
    """One modality of N rows. ``values`` is one of

        [N, D] float          vectors
        [sum T, D] float      frames of ragged sequences, with ``offsets`` [N + 1]: row i has offsets[i]:offsets[i + 1]
        [sum T] int64         tokens, with ``offsets`` likewise

    offsets: int64, from 0 to sum T, never decreasing. A row without a frame does not have this modality.
    shape: (height, width) of pictures flattened row by row to D; their values lie in [0, 1] and are never standardised.
    present: [N] bool, False where a row of vectors does not have this modality; None when all have it. For sequences
        leave it out: a length of 0 says it.
    table: [V, E] float, the embedding of every token where one comes with the data; row 0 is padding.
    vocabulary: number of different tokens; taken from the table or the largest token when 0.
    texts: of tokens, the strings [N] that they stand for, where they are known; another tokenizer can read them.
    tokenizer: which one numbered the tokens, as ``models.data.tokenizer`` names it; empty for words of the data's own.
    Raises ValueError, naming the modality, for shapes, offsets or dtypes that do not fit.
    """

    name: str
    values: Tensor
    offsets: Tensor | None = None
    shape: tuple[int, int] | None = None
    present: Tensor | None = None
    table: Tensor | None = None
    vocabulary: int = 0
    texts: tuple[str, ...] = ()
    tokenizer: str = ""

    def __post_init__(self) -> None:
        _check_values(self)
        if self.texts and len(self.texts) != len(self):
            raise ValueError(f"texts of {self.name!r} must be {len(self)}, one per row, got {len(self.texts)}")
        if self.offsets is not None:
            _check_offsets(self)
            if self.present is not None:
                raise ValueError(f"modality {self.name!r} is a sequence: a length of 0 says that it is missing")
        elif self.present is not None and (self.present.shape != (len(self),) or self.present.dtype != torch.bool):
            raise ValueError(f"present of {self.name!r} must be bool [{len(self)}], got {tuple(self.present.shape)}")
        if self.is_tokens and not self.vocabulary:
            largest = int(self.values.max()) + 1 if len(self.values) else 1
            object.__setattr__(self, "vocabulary", largest if self.table is None else len(self.table))

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def is_sequence(self) -> bool:
        """Rows have time steps: frames or tokens."""
        return self.offsets is not None

    @property
    def is_tokens(self) -> bool:
        return not self.values.is_floating_point()

    @property
    def dim(self) -> int:
        """Features of a vector or a frame; of a token the width of its table, 0 without one."""
        if self.is_tokens:
            return 0 if self.table is None else self.table.shape[1]
        return self.values.shape[1]

    def lengths(self) -> Tensor:
        """Steps [N] of every sequence; 1 for vectors and 0 where the modality is missing."""
        if self.offsets is not None:
            return self.offsets.diff()
        return torch.ones(len(self), dtype=torch.int64) if self.present is None else self.present.long()

    def has(self) -> Tensor:
        """[N] bool: which rows have this modality."""
        return self.lengths() > 0

    def take(self, rows: Tensor) -> Inputs:
        """The given rows; sequences come zero-padded on the right to the longest one among them (at least one step)."""
        if self.offsets is None:
            if self.present is None or bool(self.present[rows].all()):
                return Inputs(self.values[rows])
            here = self.present[rows]
            return Inputs(self.values[rows].masked_fill(~here[:, None], 0), None, here)
        start = self.offsets[rows]
        lengths = self.offsets[rows + 1] - start
        steps = torch.arange(max(int(lengths.max()) if len(rows) else 1, 1))
        valid = steps < lengths[:, None]
        here = lengths > 0
        present = None if bool(here.all()) else here
        if len(self.values) == 0:
            shape = (len(rows), len(steps), *self.values.shape[1:])
            return Inputs(self.values.new_zeros(shape), lengths, present)
        index = (start[:, None] + steps).clamp(max=len(self.values) - 1)
        values = self.values[index]
        return Inputs(values.masked_fill(~valid.reshape(*valid.shape, *[1] * (values.dim() - 2)), 0), lengths, present)

    def rows_of_frames(self) -> Tensor:
        """For each frame (or vector) the index of its row."""
        if self.offsets is None:
            return torch.arange(len(self.values))
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())

    def select(self, rows: Tensor) -> Modality:
        """A modality of the given rows alone (indices), in that order."""
        if self.offsets is None:
            present = None if self.present is None else self.present[rows]
            return replace(self, values=self.values[rows], present=present)
        lengths = self.lengths()[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
        values = self.values[torch.repeat_interleave(self.offsets[rows], lengths) + within]
        texts = tuple(self.texts[int(row)] for row in rows) if self.texts else ()
        return replace(self, values=values, offsets=offsets, texts=texts)


@dataclass(frozen=True)
class Dataset:
    """Aligned modalities of N rows, what is to be predicted, and who belongs to which split.

    labels: int64 [N] class numbers from 0, or float [N] or [N, K] regression targets; None for Target.none().
    labelled: [N] bool; None when every row has a label. Rows without one may hold any finite value.
    split: int64 [N], 0 train, 1 valid, 2 test, -1 unused.
    ids: a name per row, for messages and tables. groups: int64 [N], the speaker, subject or video of a row.
    Raises ValueError, naming what does not fit: row counts, names, codes, dtypes.
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
        """The modality of that name. Raises KeyError that lists those there are."""
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
                f"data {self.name!r} has no {split} rows (a split that is drawn needs about five rows of every class)"
            )
        return rows

    def labelled_rows(self, split: str) -> Tensor:
        """Indices of one split's rows that have a label. Raises ValueError when there is none."""
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
        """The same rows with these modalities alone, in this order. Raises ValueError for unknown or repeated names."""
        wrong = [name for name in names if name not in self.names]
        if wrong or len(set(names)) < len(names) or not names:
            raise ValueError(f"modalities must be different names out of {', '.join(self.names)}; got {list(names)}")
        return replace(self, modalities=tuple(self[name] for name in names))

    def select(self, rows: Tensor) -> Dataset:
        """The given rows (indices) alone, in that order."""
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

        A feature whose deviation is below what its own numbers resolve in single precision (about 1e-7 of the largest
        one) counts as constant and is only centred; its unit does not matter. Pictures and tokens stay as they are.
        """
        train = self.split == SPLITS["train"]
        return replace(self, modalities=tuple(_standardised(m, train) for m in self.modalities))

    def digest(self) -> str:
        """Hash of everything that a result depends on: values, labels and splits. Costs a pass over the data."""
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
        """Batches of one split, in order; shuffled and without the incomplete last batch when a seed is given.

        A permutation hangs on (seed, epoch) alone. ``labelled`` leaves out the rows without a label.
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


def _code(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS[split]


def _standardised(modality: Modality, train: Tensor) -> Modality:
    if modality.is_tokens or modality.shape is not None:
        return modality
    used = (train & modality.has())[modality.rows_of_frames()]
    if not bool(used.any()):
        raise ValueError(f"modality {modality.name!r} is missing in every train row")
    frames = modality.values[used].double()
    mean, std = frames.mean(0), frames.std(0, correction=0)
    resolved = torch.finfo(torch.float32).eps * frames.abs().amax(0)
    std = torch.where(std > resolved, std, torch.ones_like(std))
    values = ((modality.values.double() - mean) / std).to(torch.float32)
    if modality.present is not None:
        values = values.masked_fill(~modality.present[:, None], 0)
    return replace(modality, values=values)


def _check_values(modality: Modality) -> None:
    values, name = modality.values, modality.name
    if not name:
        raise ValueError("a modality needs a name")
    if values.is_floating_point():
        if values.dim() != 2 or values.shape[1] == 0:
            raise ValueError(f"values of {name!r} must be [N, D] or [sum T, D], got {tuple(values.shape)}")
        if modality.shape is not None and modality.shape[0] * modality.shape[1] != values.shape[1]:
            raise ValueError(f"shape of {name!r} must hold {values.shape[1]} pixels, got {modality.shape}")
        if modality.table is not None:
            raise ValueError(f"table of {name!r} must be left out: its values are no tokens")
        return
    if values.dtype != torch.int64 or values.dim() != 1 or modality.offsets is None:
        raise ValueError(
            f"values of {name!r} must be float, or int64 tokens [sum T] with offsets; got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    if modality.table is not None and (modality.table.dim() != 2 or not modality.table.is_floating_point()):
        raise ValueError(f"table of {name!r} must be float [V, E], got {tuple(modality.table.shape)}")
    known = len(modality.table) if modality.table is not None else modality.vocabulary
    if len(values) and (int(values.min()) < 0 or (known and int(values.max()) >= known)):
        raise ValueError(
            f"tokens of {name!r} must lie between 0 and {known - 1 if known else 'the vocabulary'}, "
            f"got {int(values.min())} to {int(values.max())}"
        )


def _check_offsets(modality: Modality) -> None:
    offsets, name, frames = modality.offsets, modality.name, len(modality.values)
    assert offsets is not None
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(f"offsets of {name!r} must be int64 [N + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != frames:
        raise ValueError(
            f"offsets of {name!r} must run from 0 to {frames}, they run from {int(offsets[0])} to {int(offsets[-1])}"
        )
    if bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets of {name!r} must not decrease")


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
