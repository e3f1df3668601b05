"""Pickles of the ACL 2017 release of MOSI (Poria et al.): ``audio.pickle``, one modality that is named after the file.

A tuple ``(train [V, U, D], train labels [V, U], test [W, U, D], test labels [W, U], U, train lengths [V], test lengths
[W])`` for V training and W test videos of at most U utterances, padded behind their lengths. Rows are utterances, those
of a video form a group; which video it is stands in ``transcripts.csv`` alone. There are no validation rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats.arrays import SPLIT_CODES, Arrays
from models.data.formats.checks import numbers
from models.data.formats.repairs import vectors

NAME = "acl17"
DIMS = (3, 2, 3, 2)  # of the four arrays that the tuple starts with


def fits(content: Any) -> bool:
    """Seven things, the first four of them arrays of videos."""
    return isinstance(content, tuple) and len(content) == 7 and tuple(map(np.ndim, content[:4])) == DIMS


def from_content(content: Any, path: str | Path) -> Arrays:
    """Arrays of the unpickled ``content``. Raises ValueError naming the file and what does not fit."""
    path = Path(path)
    if not fits(content):
        raise ValueError(
            f"{path} must be a tuple (train, train labels, test, test labels, steps, train lengths, test lengths)"
        )
    train, test = _side(content, 0, path, "train"), _side(content, 1, path, "test")
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(
            f"{path}: train and test must have equal features, got {train[0].shape[1]} and {test[0].shape[1]}"
        )
    values, labels, lengths = (np.concatenate(parts) for parts in zip(train, test, strict=True))
    sides = (("train", train[2]), ("test", test[2]))
    result = Arrays(str(path), NAME, labels={"labels": labels}, groups=np.repeat(np.arange(len(lengths)), lengths))
    result.modalities[path.stem] = vectors(values, path.stem, result.notes)
    result.split = np.repeat([SPLIT_CODES[name] for name, _ in sides], [int(side.sum()) for _, side in sides])
    videos = [(f"{name}{v}", length) for name, side in sides for v, length in enumerate(side)]
    result.ids = tuple(f"{video}[{u}]" for video, length in videos for u in range(length))
    return result.check()


def _side(content: tuple[Any, ...], side: int, path: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors [N, D] and labels [N] of the utterances of one split, and the lengths [V] of its videos."""
    values, labels = (numbers(content[2 * side + i], path, f"{name}{('', ' labels')[i]}") for i in range(2))
    lengths = numbers(content[5 + side], path, f"{name} lengths")
    videos, steps = values.shape[:2]
    if labels.shape != (videos, steps) or lengths.shape != (videos,):
        raise ValueError(
            f"{path}: {name} has {videos} videos of {steps} utterances, but labels of shape {labels.shape} and "
            f"lengths of shape {lengths.shape}"
        )
    if lengths.min() < 0 or lengths.max() > steps or (lengths != np.round(lengths)).any():
        raise ValueError(
            f"{path}: {name} lengths must be whole numbers up to {steps}, got {lengths.min():g} to {lengths.max():g}"
        )
    inside = np.arange(steps) < lengths[:, None]
    return values[inside], labels[inside], lengths.astype(np.int64)
