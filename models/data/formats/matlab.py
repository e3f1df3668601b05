"""MATLAB ``.mat`` files (version 5 and 7, by scipy): numeric variables, no cells, structures or objects.

``read_variables`` gives all of them as arrays. ``read`` takes a file as a data set: the variable with a usual label
name (``y``, ``label``, ...) is the labels, every other 2-D or 3-D one a modality. MATLAB users often put rows last;
where the labels say so, the axes are turned round and a note says it.
"""

from __future__ import annotations

import io
import math
import warnings
import zlib
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import check_size, listed, numbers, read_bytes
from models.data.formats.csv_table import LABEL_NAMES
from models.data.formats.hdf5 import SIGNATURE
from models.data.formats.repairs import vectors

NAME = "matlab"
NUMERIC = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def fits(path: Path) -> bool:
    return path.suffix.lower() == ".mat"


def read_variables(path: str | Path) -> dict[str, np.ndarray]:
    """The numeric variables of a file, in its order.

    Raises FileNotFoundError, or ValueError naming the file and variable.
    """
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    data = read_bytes(path)
    if data[:8] == SIGNATURE or b"MATLAB 7.3" in data[:128]:
        raise ValueError(f"{path} is a version 7.3 file: save it in MATLAB with the option -v7")
    if data[:10] != b"MATLAB 5.0":
        raise ValueError(f"{path} is not a MATLAB file of version 5 or 7")
    broken = (
        TypeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
        OSError,
        EOFError,
        AttributeError,
        zlib.error,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            listing = whosmat(io.BytesIO(data))
            _check(listing, len(data), path)
            content = loadmat(io.BytesIO(data), variable_names=[name for name, _, _ in listing])
    except (MatReadError, Warning, *broken) as error:
        raise ValueError(f"{path} is not a complete MATLAB file: {str(error)[:160] or type(error).__name__}") from error
    except ValueError as error:
        raise (
            error if str(error).startswith(str(path)) else ValueError(f"{path} is damaged: {str(error)[:160]}")
        ) from error
    return {name: content[name] for name, _, _ in listing}


def _check(listing: list[tuple[str, tuple[int, ...], str]], size: int, path: str | Path) -> None:
    if not listing:
        raise ValueError(f"{path} holds no variables")
    for name, shape, kind in listing:
        if kind not in NUMERIC:
            raise ValueError(f"{path}: variable {name[:60]!r} must be numeric, it is a {kind}")
        if any(length < 0 for length in shape):
            raise ValueError(f"{path}: variable {name[:60]!r} has a malformed shape {shape}")
    total = sum(8.0 * math.prod(float(length) for length in shape) for _, shape, _ in listing)
    check_size(total, size, path, listing[0][0])


def read(path: str | Path) -> Arrays:
    """Arrays of one file. Raises FileNotFoundError, or ValueError naming the file and the variable."""
    variables = read_variables(path)
    result = Arrays(str(path), NAME)
    found = [name for name in variables if name.lower() in LABEL_NAMES]
    if len(found) > 1:
        raise ValueError(f"{path} must hold one variable of labels, it has {listed(found)}")
    for name in found:
        labels = numbers(variables.pop(name), path, name)
        result.labels[name] = labels.reshape(-1) if 1 in labels.shape else labels
    rows = len(result.labels[found[0]]) if found else None
    for name, values in variables.items():
        if values.ndim not in (2, 3):
            raise ValueError(f"{path}: variable {name!r} must have two or three axes, got {values.shape}")
        result.modalities[name] = _part(numbers(values, path, name), rows, name, result.notes)
    return result.check()


def _part(values: np.ndarray, rows: int | None, name: str, notes: list[str]) -> Part:
    if rows is not None and values.shape[0] != rows and values.shape[-1] == rows:
        notes.append(f"{name}: rows came last, {values.shape}, and were moved to the front")
        values = np.moveaxis(values, -1, 0)
    if values.ndim == 2:
        return vectors(np.ascontiguousarray(values), name, notes)
    steps = values.shape[1]
    return Part(values.reshape(-1, values.shape[2]), offsets_of(np.full(len(values), steps)))
