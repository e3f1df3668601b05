"""AV-MNIST as MultiBench distributes it: a folder of ``.npy`` files.

``image/{train,test}_data.npy`` [N, 784], ``audio/{train,test}_data.npy`` [N, 112, 112] (spectrograms),
``{train,test}_labels.npy`` [N]. Both are scaled to [0, 1]. Split: the first 55,000 training rows train, the last 5,000
valid (of another number: the last twelfth), as MultiBench's loader does.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays
from models.data.formats.npy import read_npy
from models.data.formats.repairs import pictures

NAME = "avmnist"
SIDES = ("train", "test")


def fits(path: Path) -> bool:
    return path.is_dir() and (path / "image").is_dir() and (path / "audio").is_dir()


def read(path: str | Path) -> Arrays:
    """Arrays of the folder. Raises FileNotFoundError, or ValueError naming the file that is malformed."""
    path = Path(path)
    result = Arrays(str(path), NAME)
    labels = {side: read_npy(path / f"{side}_labels.npy").reshape(-1) for side in SIDES}
    rows = {side: len(values) for side, values in labels.items()}
    result.labels["labels"] = np.concatenate(list(labels.values()))
    for name in ("image", "audio"):
        values = np.concatenate(_squares([path / name / f"{side}_data.npy" for side in SIDES]))
        result.modalities[name] = pictures(values, path, name, result.notes, len(result.labels["labels"]))
    valid = rows["train"] // 12
    counts = {0: rows["train"] - valid, 1: valid, 2: rows["test"]}
    result.split = np.repeat(list(counts), list(counts.values()))
    return result.check()


def _squares(files: list[Path]) -> list[np.ndarray]:
    """The pictures of both sides, [N, H, W] of one size and dtype."""
    found = []
    for file in files:
        values = read_npy(file)
        if values.ndim == 2:
            side = math.isqrt(values.shape[1])
            if side * side != values.shape[1]:
                raise ValueError(f"{file} must hold square pictures, its rows have {values.shape[1]} pixels")
            values = values.reshape(len(values), side, side)
        found.append(values)
    if len({(values.shape[1:], values.dtype) for values in found}) != 1:
        shapes = " and ".join(f"{values.shape[1:]} {values.dtype}" for values in found)
        raise ValueError(f"{files[0].parent} must hold pictures of one size and type, it has {shapes}")
    return found
