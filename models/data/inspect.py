"""What is in a file: modalities, shapes, lengths, splits, labels, and what is odd."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.data import formats
from models.data.dataset import SPLITS
from models.data.formats.arrays import Arrays, Part
from models.data.formats.checks import printable

MAX_CLASSES = 12
LARGE = 1e4


def describe(path: str | Path, format: str | None = None) -> str:
    """A few lines about a file or folder in any known format.

    Raises FileNotFoundError, or ValueError naming the file and the key that cannot be read.
    """
    arrays = formats.read(path, format)
    lines = [f"{path}: {arrays.format}, {len(arrays)} rows"]
    for name, part in arrays.modalities.items():
        lines.append(f"  modality {name}: {_part(part)}")
    for name, part in arrays.optional.items():
        lines.append(f"  modality {name} (used when named): {_part(part)}")
    for name, texts in arrays.texts.items():
        lines.append(f"  text {name} (tokens when named): {len(set(texts))} different, e.g. {texts[0][:50]!r}")
    for i, (name, values) in enumerate(arrays.labels.items()):
        lines.append(f"  label {name}{' (default)' if i == 0 else ''}: {_label(arrays, name, values)}")
    lines.append(
        f"  split: {_split(arrays.split)}" if arrays.split is not None else "  split: none, it is drawn by seed"
    )
    lines += [f"  split {name}: {_split(values)}" for name, values in arrays.splits.items()]
    if arrays.groups is not None:
        lines.append(f"  groups: {len(np.unique(arrays.groups))}")
    odd = _odd(arrays)
    lines += [f"  odd: {note}" for note in odd] if odd else ["  nothing odd"]
    return "\n".join(printable(line) for line in lines)


def _part(part: Part) -> str:
    lengths = part.lengths()
    missing = int((lengths == 0).sum())
    absent = f", missing in {missing} rows" if missing else ""
    if part.offsets is None:
        kind = f"pictures of {part.shape[0]} x {part.shape[1]}" if part.shape else f"vectors of {part.values.shape[1]}"
        return kind + absent
    here = lengths[lengths > 0]
    steps = f"{here.min()} steps" if here.min() == here.max() else f"{here.min()} to {here.max()} steps"
    if part.values.ndim == 1:
        return f"tokens, {int(part.values.max()) + 1} different at most, {steps}{absent}"
    frames = f"{part.shape[0]} x {part.shape[1]} pictures" if part.shape else f"{part.values.shape[1]} features"
    return f"sequences of {frames}, {steps}{absent}"


def _label(arrays: Arrays, name: str, values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "NaN in every row"
    whole = values.ndim == 1 and bool((known == np.round(known)).all())
    if not whole or arrays.kinds.get(name) == "regression":
        width = "" if values.ndim == 1 else f"{values.shape[1]} dimensions, "
        return f"regression target, {width}{known.min():g} to {known.max():g}, mean {known.mean():.3g}"
    found, counts = np.unique(known, return_counts=True)
    names = arrays.classes.get(name, ())
    shown = [
        f"{names[int(code)] if 0 <= code < len(names) else format(code, 'g')}: {count}"
        for code, count in zip(found[:MAX_CLASSES], counts, strict=False)
    ]
    return f"{len(found)} classes ({', '.join(shown)}{', ...' if len(found) > MAX_CLASSES else ''})"


def _split(split: np.ndarray) -> str:
    counts = {name: int((split == code).sum()) for name, code in SPLITS.items()}
    unused = int((split == -1).sum())
    return ", ".join(f"{number} {name}" for name, number in counts.items()) + (f", {unused} unused" if unused else "")


def _odd(arrays: Arrays) -> list[str]:
    """The reader's notes, and what the numbers themselves show."""
    odd = list(arrays.notes)
    if not arrays.labels:
        odd.append("there are no labels")
    for name, values in arrays.labels.items():
        bad = int((~np.isfinite(values)).reshape(len(values), -1).any(1).sum())
        if bad:
            odd.append(f"label {name}: {bad} rows are NaN and count as unlabelled")
        if len(np.unique(values[np.isfinite(values)])) == 1:
            odd.append(f"label {name}: the same in every row")
    for split, code in SPLITS.items():
        if arrays.split is not None and not (arrays.split == code).any() and f"there are no {split} rows" not in odd:
            odd.append(f"there are no {split} rows")
    for name, part in {**arrays.modalities, **arrays.optional}.items():
        if part.values.ndim == 2 and part.shape is None:
            odd += [f"{name}: {note}" for note in _features(part.values)]
    return odd


def _features(values: np.ndarray) -> list[str]:
    low, high = values.min(0), values.max(0)
    constant = int((low == high).sum())
    notes = [f"{constant} of {len(low)} features never change"] if constant else []
    largest = float(np.abs(values).max())
    if largest > LARGE:
        notes.append(f"values reach {largest:.3g}")
    return notes
