"""IDX, the format of MNIST and its relatives: ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``, gzipped or not.

Big-endian: two zero bytes, a type code, the number of dimensions, the dimensions as uint32, then the values. A folder
gives train and test rows; one file of pictures takes its labels from the file beside it, where there is one.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays
from models.data.formats.checks import numbers, read_bytes
from models.data.formats.repairs import pictures, vectors

NAME = "idx"
DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMS = 4
_SPLITS = {"train": 0, "valid": 1, "t10k": 2, "test": 2}


def fits(path: Path) -> bool:
    """A folder with IDX files, or one by its name."""
    return any(path.glob("*-idx[0-9]-*")) if path.is_dir() else "-idx" in path.name


def looks_like(head: bytes) -> bool:
    """Whether a file that starts with these bytes is IDX."""
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in DTYPES and 1 <= head[3] <= MAX_DIMS


def read_array(path: str | Path) -> np.ndarray:
    """The one array of a file.

    Raises FileNotFoundError, or ValueError for a wrong header or a wrong number of bytes.
    """
    data = read_bytes(path)
    if not looks_like(data):
        raise ValueError(f"{path} is not an IDX file: it starts with {data[:4].hex()}")
    dtype, dims = np.dtype(DTYPES[data[2]]), data[3]
    start = 4 + 4 * dims
    if len(data) < start:
        raise ValueError(f"{path} ends inside its header")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dims, 4))
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - start != needed:
        raise ValueError(f"{path} must have {needed} bytes for its shape {shape}, it has {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read(path: str | Path) -> Arrays:
    """Arrays of a folder or of one file. Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    if path.is_file() or not path.exists():
        return _one(path)
    images = sorted(path.glob("*-images-idx3-*"))
    if not images:
        raise ValueError(f"{path} has no files named like train-images-idx3-ubyte")
    found, split = [], []
    for file in images:
        part = _one(file)
        name = file.name.split("-")[0]
        if name not in _SPLITS:
            raise ValueError(f"{file} must start with train, valid, test or t10k to say its split")
        found.append(part)
        split.append(np.full(len(part), _SPLITS[name]))
    from models.data.formats.pickled import concatenated

    notes = [note for part in found for note in part.notes]
    notes += ["there are no train rows"] * (not any((codes == 0).any() for codes in split))
    return concatenated(found, str(path), NAME, np.concatenate(split), notes)


def _one(path: Path) -> Arrays:
    values = read_array(path)
    result = Arrays(str(path), NAME)
    if values.ndim == 1:
        result.labels["labels"] = numbers(values, path, "labels")
        return result.check()
    labels = _labels_beside(path)
    if labels is not None:
        result.labels["labels"] = read_array(labels).astype(np.int64)
        if result.labels["labels"].ndim != 1:
            raise ValueError(f"{labels} must hold one label per picture, got {result.labels['labels'].shape}")
    if values.ndim == 2:
        result.modalities["vector"] = vectors(numbers(values, path, "vector"), "vector", result.notes)
    else:
        rows = len(result.labels["labels"]) if result.labels else None
        result.modalities["image"] = pictures(values, path, "image", result.notes, rows)
    return result.check()


def _labels_beside(path: Path) -> Path | None:
    """The file of labels that belongs to a file of pictures, gzipped or not."""
    name = path.name.removesuffix(".gz")
    if "-images-idx3-" not in name:
        return None
    labels = path.with_name(name.replace("-images-idx3-", "-labels-idx1-"))
    return next((file for file in (labels, labels.with_name(labels.name + ".gz")) if file.is_file()), None)
