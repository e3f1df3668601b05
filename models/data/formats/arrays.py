"""What every reader of a format returns, and the checks and repairs that readers share."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SPLIT_CODES = {"train": 0, "valid": 1, "val": 1, "dev": 1, "validation": 1, "test": 2}
# A file may unpack to this much, and to this many times its own size beyond it: sparse data compresses a few hundred
# times, a bomb by far more.
FREE_BYTES = 1 << 30
MAX_RATIO = 200


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


def read_bytes(path: str | Path) -> bytes:
    """A file's content, unzipped when it is gzip.

    Raises FileNotFoundError, or ValueError where it is no data at all.
    """
    path = require_data(path)
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    limit = unpacked_limit(len(data))
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if len(content) > limit:
        raise ValueError(f"{path} unpacks to more than {MAX_RATIO} times its size; unpack it yourself if you trust it")
    return content


def require_data(path: str | Path) -> Path:
    """The path of a file that is there, not empty, and neither a web page nor a pointer to a file not fetched."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page, not data: the download failed")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not data: fetch the file itself")
    return path


def unpacked_limit(file_bytes: int) -> int:
    """Bytes that a file of this size may unpack to."""
    return FREE_BYTES + MAX_RATIO * file_bytes


def check_size(number: float, file_bytes: int, path: str | Path, key: str) -> None:
    """Raises ValueError when ``number`` bytes are more than a file of this size can honestly hold."""
    if number > unpacked_limit(file_bytes):
        raise ValueError(
            f"{path}: {key!r} claims {number / 2**30:.3g} GiB in a file of {file_bytes / 2**20:.3g} MiB; it is damaged"
        )


def require(content: Mapping[str, Any], key: str, path: str | Path, where: str = "") -> Any:
    """``content[key]``. Raises ValueError that lists the keys there are."""
    if key not in content:
        raise ValueError(f"{path}{where} has no {key!r}; it has {listed(content)}")
    return content[key]


def listed(names: Any) -> str:
    """Names for an error message: at most a dozen."""
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def numbers(
    value: Any,
    path: str | Path,
    key: str,
    *,
    infinite: str = "refuse",
    nan: str = "refuse",
    notes: list[str] | None = None,
) -> np.ndarray:
    """``value`` as float32 of the same shape. Raises ValueError for what is not numeric or not finite.

    infinite, nan: "refuse", "keep", or "zero", which replaces them by 0 and says so in ``notes`` (the rule of MulT,
    MMSA and MultiBench for COVAREP's -inf).
    """
    array = np.asarray(value) if not isinstance(value, np.ndarray) else value
    if array.dtype.kind not in "fiub":
        kind = "objects" if array.dtype == object else array.dtype
        raise ValueError(f"{path}: {key!r} must be numeric, it holds {kind}")
    if array.size == 0:
        raise ValueError(f"{path}: {key!r} is empty, its shape is {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(array, dtype=np.float32)
    if array.dtype.kind in "iub" or np.isfinite(result).all():
        return result
    for name, bad, rule in (("NaN", np.isnan(result), nan), ("infinite", np.isinf(result), infinite)):
        count = int(bad.sum())
        if count and rule == "zero":
            result[bad] = 0
            if notes is not None:
                notes.append(f"{key}: {count} {name} values were set to 0")
        elif count and rule == "refuse":
            row = int(np.argwhere(bad)[0][0]) if bad.ndim else 0
            raise ValueError(
                f"{path}: {key!r} holds {count} values that are not finite ({name}), the first in row {row}"
            )
    return result


def unpad(values: np.ndarray, side: str, name: str, notes: list[str]) -> Part:
    """Frames of zero-padded sequences [N, T, D]: zeros before the first ("left") or after the last frame ("right") go.

    Where only the other side is padded, that side is trimmed and a note says so. Rows of zeros alone have no frame: the
    modality is missing there. Zero frames between others stay.
    """
    used = (values != 0).any(2)
    start, stop = bounds(used)
    lead, tail = int((start > 0).sum()), int((stop[stop > start] < values.shape[1]).sum())
    other = {"left": "right", "right": "left"}[side]
    if (lead if side == "left" else tail) == 0 and (tail if side == "left" else lead) > 0:
        notes.append(f"{name}: padded on the {other}, not on the {side} as this format is")
        side = other
    if side == "left":
        stop = np.where(stop > start, values.shape[1], start)
    else:
        start = np.where(stop > start, 0, stop)
    return cut(values, start, stop, name, notes)


def bounds(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First used step and the one behind the last, each [N], of bool [N, T]; both T where none is used."""
    steps = used.shape[1]
    some = used.any(1)
    start = np.where(some, used.argmax(1), steps)
    return start, np.where(some, steps - used[:, ::-1].argmax(1), steps)


def cut(values: np.ndarray, start: np.ndarray, stop: np.ndarray, name: str, notes: list[str]) -> Part:
    """Frames start[i]:stop[i] of every row of [N, T, D]; notes how many rows have none."""
    steps = np.arange(values.shape[1])
    keep = (steps >= start[:, None]) & (steps < stop[:, None])
    lengths = keep.sum(1)
    note_missing(lengths == 0, name, notes)
    return Part(values[keep], offsets_of(lengths))


def note_missing(missing: np.ndarray, name: str, notes: list[str]) -> None:
    if missing.any():
        notes.append(f"{name}: {int(missing.sum())} rows are all zero or empty and count as missing")


def vectors(values: np.ndarray, name: str, notes: list[str]) -> Part:
    """Vectors [N, D]; rows of zeros are kept and noted."""
    zero = int((~values.any(1)).sum())
    if zero:
        notes.append(f"{name}: {zero} rows are all zero")
    return Part(values)


def pictures(values: np.ndarray, path: str | Path, name: str, notes: list[str], rows: int | None = None) -> Part:
    """Pictures [N, H, W] scaled to [0, 1]: by 255 or 65,535 as their dtype says, or for floats as their largest value.

    [H, W, N] (MATLAB's order) is turned round where ``rows`` says which axis counts; pictures in colour [N, H, W, C]
    become vectors. Raises ValueError for another shape and for negative values.
    """
    if rows is not None and values.ndim == 3 and values.shape[0] != rows and values.shape[2] == rows:
        notes.append(f"{name}: rows came last, {values.shape}, and were moved to the front")
        values = np.moveaxis(values, 2, 0)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"{path}: pictures {name!r} must be [N, height, width], got {values.shape}")
    if rows is not None and len(values) != rows:
        raise ValueError(f"{path}: pictures {name!r} must be [{rows}, height, width], got {values.shape}")
    scaled = numbers(values, path, name)
    largest = float(scaled.max())
    if scaled.min() < 0:
        raise ValueError(f"{path}: pictures {name!r} must not be negative, the smallest value is {scaled.min():g}")
    unit = {"uint8": 255, "uint16": 65535}.get(
        values.dtype.name, 1 if largest <= 1 else 255 if largest <= 255 else 65535
    )
    if largest > unit:
        raise ValueError(f"{path}: pictures {name!r} must lie below 65536, the largest value is {largest:g}")
    scaled /= unit
    flat = scaled.reshape(len(scaled), -1)
    if values.ndim == 4:
        notes.append(f"{name}: pictures of {values.shape[1:]} are used as vectors")
        return Part(flat)
    return Part(flat, shape=(values.shape[1], values.shape[2]))


def sequences(items: Sequence[np.ndarray], path: str | Path, key: str, notes: list[str], **rules: str) -> Part:
    """A list of N arrays [T_i, D] as one ragged modality; empty ones are missing."""
    widths = {item.shape[-1] for item in items if item.ndim == 2 and item.size}
    if not items or any(item.ndim > 2 or (item.ndim < 2 and item.size) for item in items) or len(widths) != 1:
        raise ValueError(f"{path}: {key!r} must be sequences [T, D] of one width, got widths {listed(sorted(widths))}")
    width = widths.pop()
    check_size(sum(item.nbytes for item in items), file_bytes(path), path, key)
    frames = numbers(np.concatenate([item.reshape(-1, width) for item in items]), path, key, notes=notes, **rules)
    lengths = np.array([len(item) if item.size else 0 for item in items])
    part = Part(frames, offsets_of(lengths))
    silent = np.array([not frames[a:b].any() for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)])  # type: ignore[index]
    note_missing(silent, key, notes)
    if (silent & (lengths > 0)).any():
        keep = np.repeat(~silent, lengths)
        part = Part(frames[keep], offsets_of(np.where(silent, 0, lengths)))
    return part


def file_bytes(path: str | Path) -> int:
    """Size of a file, or of all files directly in a folder."""
    path = Path(path)
    if path.is_dir():
        return sum(item.stat().st_size for item in path.iterdir() if item.is_file())
    return path.stat().st_size if path.exists() else 0


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
