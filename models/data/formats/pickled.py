"""What the pickles of affective computing share: ``{"train": {...}, "valid": {...}, "test": {...}}`` of arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats.arrays import SPLIT_CODES, Arrays, Part, offsets_of, strings
from models.data.formats.checks import listed, numbers, require
from models.data.formats.repairs import bounds, cut

MODALITIES = ("text", "audio", "vision")


def has_splits(content: Any) -> bool:
    """A dictionary of dictionaries by split name."""
    return isinstance(content, dict) and any(isinstance(content.get(name), dict) for name in SPLIT_CODES)


def by_split(content: Any, path: str | Path) -> dict[str, dict[str, Any]]:
    """The splits in the order train, valid, test. Raises ValueError when there is none or one is no dictionary."""
    if not has_splits(content):
        keys = listed(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} has no splits 'train', 'valid' and 'test'; it has {keys}")
    found = {name: content[name] for name in sorted(SPLIT_CODES, key=lambda n: SPLIT_CODES[n]) if name in content}
    for name, part in found.items():
        if not isinstance(part, dict):
            raise ValueError(f"{path}: split {name!r} must be a dictionary of arrays, it is a {type(part).__name__}")
    return found


def joined(
    content: Any, path: str | Path, name: str, read: Callable[[dict[str, Any], str, list[str]], Arrays]
) -> Arrays:
    """One Arrays from the splits, each read by ``read(split, where, notes)``; splits without a row are noted."""
    parts, split, notes = [], [], []
    for key, part in by_split(content, path).items():
        own: list[str] = []
        if all(hasattr(value, "__len__") and len(value) == 0 for value in part.values()):
            notes.append(f"split {key!r} has no rows")
            continue
        arrays = read(part, f"{path}, split {key!r}", own)
        arrays.path = f"{path}, split {key!r}"
        parts.append(arrays.check())
        split.append(np.full(len(arrays), SPLIT_CODES[key], np.int64))
        notes += [f"{key}: {note}" for note in own]
    if not parts:
        raise ValueError(f"{path} has no rows in any split")
    if not any((codes == SPLIT_CODES["test"]).any() for codes in split):
        notes.append("there are no test rows")
    return concatenated(parts, str(path), name, np.concatenate(split), notes)


def concatenated(parts: list[Arrays], path: str, name: str, split: np.ndarray, notes: list[str]) -> Arrays:
    """Rows of several Arrays under each other. Raises ValueError where their modalities or labels differ."""
    first = parts[0]
    result = Arrays(path, name, kinds=first.kinds, classes=first.classes, split=split, notes=notes)
    for kind in ("modalities", "optional", "labels", "texts"):
        names = list(getattr(first, kind))
        for other in parts[1:]:
            if sorted(getattr(other, kind)) != sorted(names):
                raise ValueError(f"{path}: splits differ in {kind}: {listed(names)} and {listed(getattr(other, kind))}")
        for key in names:
            getattr(result, kind)[key] = _concatenate([getattr(part, kind)[key] for part in parts], path, key)
    if all(part.ids for part in parts):
        result.ids = tuple(item for part in parts for item in part.ids)
    return result.check()


def _concatenate(items: list[Any], path: str, key: str) -> Any:
    if isinstance(items[0], list):
        return [text for item in items for text in item]
    if isinstance(items[0], Part):
        values = _concatenate([item.values for item in items], path, key)
        if items[0].offsets is None:
            present = None
            if any(item.present is not None for item in items):
                present = np.concatenate([item.lengths() > 0 for item in items])
            return Part(values, None, items[0].shape, present)
        return Part(values, offsets_of(np.concatenate([item.lengths() for item in items])), items[0].shape)
    shapes = {item.shape[1:] for item in items}
    if len(shapes) != 1:
        raise ValueError(f"{path}: {key!r} has different shapes in the splits: {listed(sorted(shapes))}")
    return np.concatenate(items)


def frames(content: dict[str, Any], key: str, where: str, notes: list[str]) -> np.ndarray:
    """``content[key]`` as float32 [N, T, D]; infinite values become 0, as all public loaders of these files do."""
    values = numbers(require(content, key, where), where, key, infinite="zero", notes=notes)
    if values.ndim != 3:
        raise ValueError(f"{where}: {key!r} must be [rows, steps, features], got {values.shape}")
    return values


def aligned(values: dict[str, np.ndarray], start: np.ndarray, stop: np.ndarray, notes: list[str]) -> dict[str, Part]:
    """The same steps start[i]:stop[i] of every modality, but none where one is zero throughout: it is missing."""
    parts = {}
    for name, array in values.items():
        some = (array != 0).any((1, 2))
        parts[name] = cut(array, start, np.where(some, stop, start), name, notes)
    return parts


def first_steps(values: np.ndarray) -> np.ndarray:
    """First step [N] that is not zero, T where all are."""
    return bounds((values != 0).any(2))[0]


def label_column(content: dict[str, Any], key: str, where: str) -> np.ndarray:
    """Labels [N] or [N, K] from [N], [N, 1], [N, 1, 1] or [N, K]. NaN stands for no label."""
    value = require(content, key, where)
    if isinstance(value, list):
        try:
            value = np.array(value)
        except ValueError:
            raise ValueError(f"{where}: {key!r} must hold one label per row") from None
    labels = numbers(value, where, key, nan="keep")
    labels = labels.reshape(len(labels), -1) if labels.ndim else labels.reshape(1, 1)
    return labels[:, 0] if labels.shape[1] == 1 else labels


def row_names(content: dict[str, Any], where: str, notes: list[str]) -> tuple[str, ...]:
    """Ids of the rows, from strings, bytes or [N, K] parts; none when there are none."""
    for key in ("id", "ids"):
        if key in content:
            return tuple(strings(content[key], where, key))
    return ()


def leftovers(content: dict[str, Any], used: set[str], notes: list[str]) -> None:
    """Says which keys of the file no one read."""
    rest = [key for key in content if key not in used]
    if rest:
        notes.append(f"not used: {listed(rest)}")
