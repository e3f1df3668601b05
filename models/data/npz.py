"""A user's own arrays in one ``.npz`` file.

Per modality NAME: ``NAME`` [N, D] or [N, T, D], or ragged frames [sum T, D] with ``off_NAME`` [N + 1];
``y`` [N] or [N, 1] with integer class labels; optional ``split`` [N] (0 train, 1 valid, 2 test), drawn by
seed when absent.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from models.batch import Target
from models.data.dataset import Dataset, Modality
from models.data.splits import stratified_split


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an ``.npz``, without pickle. Raises FileNotFoundError, or ValueError for a broken file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read without pickle: {error}") from error


def modality(arrays: dict[str, np.ndarray], name: str) -> Modality:
    """Modality ``name`` of an archive; checks shapes, offsets and finiteness."""
    if name not in arrays:
        raise ValueError(f"modality {name!r} is missing; the file has {', '.join(sorted(arrays))}")
    values = arrays[name]
    if values.dtype.kind not in "fiub":
        raise ValueError(f"modality {name!r} must be numeric, its dtype is {values.dtype}")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"modality {name!r} holds values that are not finite")
    offsets = arrays.get(f"off_{name}")
    if offsets is not None:
        _check_offsets(offsets, values, name)
    elif values.ndim == 3:
        offsets = np.arange(len(values) + 1) * values.shape[1]
        values = values.reshape(-1, values.shape[2])
    elif values.ndim != 2:
        raise ValueError(f"modality {name!r} must be [N, D], [N, T, D] or ragged with off_{name}; got {values.shape}")
    return Modality(
        name,
        torch.from_numpy(values),
        None if offsets is None else torch.from_numpy(offsets.astype(np.int64)),
    )


def _check_offsets(offsets: np.ndarray, values: np.ndarray, name: str) -> None:
    if values.ndim != 2:
        raise ValueError(f"ragged modality {name!r} must be [sum T, D], got {values.shape}")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise ValueError(f"off_{name} must be integers [N + 1], got {offsets.dtype} {offsets.shape}")
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"off_{name} must run from 0 to {len(values)}, it runs from {offsets[0]} to {offsets[-1]}")
    if (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError(f"off_{name} must not decrease")


def labels(y: np.ndarray) -> tuple[torch.Tensor, int]:
    """Class labels [N] renumbered from 0, and their number."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(f"y must hold one class label per row, [N] or [N, 1]; got {y.shape}")
    if y.dtype.kind not in "fiub" or not np.isfinite(y).all() or not np.equal(np.round(y), y).all():
        raise ValueError("y must hold finite integer class labels; bin a regression target first")
    names, codes = np.unique(y, return_inverse=True)
    if len(names) < 2:
        raise ValueError("y must hold at least two classes")
    return torch.from_numpy(codes.astype(np.int64)), len(names)


def splits(arrays: dict[str, np.ndarray], y: np.ndarray, seed: int) -> torch.Tensor:
    if "split" not in arrays:
        return torch.from_numpy(stratified_split(y, seed))
    split = arrays["split"]
    if split.shape != y.shape or not np.isin(split, (0, 1, 2)).all():
        raise ValueError(f"split must be [{len(y)}] with codes 0 train, 1 valid, 2 test; got {split.shape}")
    return torch.from_numpy(split.astype(np.int64))


def load_npz(path: str | Path, seed: int = 0) -> Dataset:
    """Every modality of a file, in file order.

    Raises FileNotFoundError, or ValueError that names the key that is missing or malformed.
    """
    arrays = read_arrays(path)
    if "y" not in arrays:
        raise ValueError(f"{path} has no labels y; it has {', '.join(sorted(arrays)) or 'no arrays'}")
    y, num_classes = labels(arrays["y"])
    found = [
        key
        for key, value in arrays.items()
        if key not in ("y", "split") and not key.startswith("off_") and value.ndim in (2, 3)
    ]
    parts = tuple(modality(arrays, key) for key in found)
    for part in parts:
        if len(part) != len(y):
            raise ValueError(f"modality {part.name!r} has {len(part)} rows, y has {len(y)}")
    split = splits(arrays, y.numpy(), seed)
    if not (split == 0).any():
        raise ValueError(f"{path} has no train rows (split code 0)")
    return Dataset(Path(path).stem, parts, y, Target.classes(num_classes), split)
