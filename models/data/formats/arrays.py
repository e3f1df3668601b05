"""What every reader of a format returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SPLIT_CODES = {"train": 0, "valid": 1, "val": 1, "dev": 1, "validation": 1, "test": 2}


@dataclass
class Part:
    """One modality of N rows, as ``models.data.dataset.Modality`` takes it but in numpy.

    values: float32 [N, D], or frames [sum T, D] with ``offsets`` int64 [N + 1], or int64 tokens [sum T] with offsets.
    A row without frames, or with ``present`` False, does not have this modality. ``shape``: (height, width) of pictures
    flattened to D, in [0, 1]. ``table``: float [V, E], the embeddings of tokens. ``words``: the vocabulary.
    """

    values: np.ndarray
    offsets: np.ndarray | None = None
    shape: tuple[int, int] | None = None
    present: np.ndarray | None = None
    table: np.ndarray | None = None
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Frames [N] of every row; 1 for vectors, 0 where the modality is missing."""
        if self.offsets is not None:
            return np.diff(self.offsets)
        return np.ones(len(self), np.int64) if self.present is None else self.present.astype(np.int64)

    def select(self, rows: np.ndarray) -> Part:
        """The given rows (indices) in that order."""
        present = None if self.present is None else self.present[rows]
        if self.offsets is None:
            return Part(self.values[rows], None, self.shape, present, self.table, self.words)
        lengths = np.diff(self.offsets)[rows]
        offsets = offsets_of(lengths)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Part(self.values[index], offsets, self.shape, present, self.table, self.words)


@dataclass
class Arrays:
    """The named content of a file, before a data set gives it a meaning.

    modalities: those that are used unless others are named. optional: those used only when named.
    labels: candidates by their name in the file, each [N] or [N, K]; the first is the default.
    kinds: "classes" or "regression" by label, where the format says it. classes: names of a label's classes.
    texts: strings [N] that no reader turns into numbers.
    split: codes [N] (0 train, 1 valid, 2 test, -1 unused) or None. splits: others by name.
    groups: what a row belongs to (a speaker, a video), int64 [N].
    notes: a sentence for everything that was repaired or is odd.
    """

    path: str
    format: str
    modalities: dict[str, Part] = field(default_factory=dict)
    optional: dict[str, Part] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    split: np.ndarray | None = None
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        for parts in (self.modalities, self.optional, self.labels, self.texts):
            for part in parts.values():
                return len(part)
        return 0

    def check(self) -> Arrays:
        """Itself, once everything has the same number of rows. Raises ValueError that names what has not."""
        found: dict[str, Any] = {**self.modalities, **self.optional, **self.labels, **self.texts, **self.splits}
        for name, extra in (("split", self.split), ("ids", self.ids or None), ("groups", self.groups)):
            if extra is not None:
                found[name] = extra
        if not found:
            raise ValueError(f"{self.path} holds no arrays that can be used")
        rows = {name: len(part) for name, part in found.items()}
        first, number = next(iter(rows.items()))
        for name, other in rows.items():
            if other != number:
                raise ValueError(f"{self.path}: {name!r} has {other} rows, {first!r} has {number}")
        if number == 0:
            raise ValueError(f"{self.path} has no rows: {first!r} is empty")
        for name, part in {**self.modalities, **self.optional}.items():
            if not part.lengths().any():
                raise ValueError(f"{self.path}: {name!r} is missing in every row")
        return self


def offsets_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """Offsets int64 [N + 1] of sequences with these lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def strings(value: Any, path: str | Path, key: str) -> list[str]:
    """One string per row from a list or array of str, bytes or numbers; several columns are joined with "_"."""
    array = np.asarray(value, dtype=object) if isinstance(value, list | tuple) else value
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise ValueError(f"{path}: {key!r} must hold one string per row")
    if array.ndim == 1:
        return [_string(item) for item in array]
    flat = array.reshape(len(array), -1) if len(array) else array.reshape(0, 1)
    return ["_".join(_string(item) for item in row) for row in flat]


def _string(item: Any) -> str:
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    if isinstance(item, list | tuple | np.ndarray):
        return "_".join(_string(part) for part in list(item)[:16])
    return str(item)


def codes(names: Sequence[str]) -> np.ndarray:
    """int64 [N]: equal numbers for equal names."""
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1].astype(np.int64)
