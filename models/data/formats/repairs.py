"""Repairs that readers share, each with a note of what was done: padding, zero rows, pictures, ragged lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Part, offsets_of
from models.data.formats.checks import check_size, file_bytes, listed, numbers


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


def vectors(values: np.ndarray, name: str, notes: list[str], present: np.ndarray | None = None) -> Part:
    """Vectors [N, D]; rows of zeros are kept, and noted if they are not missing."""
    empty = ~values.any(1)
    zero = int((empty if present is None else empty & present).sum())
    if zero:
        notes.append(f"{name}: {zero} rows are all zero")
    return Part(values, present=present)


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
