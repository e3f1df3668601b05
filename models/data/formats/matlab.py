"""MATLAB ``.mat`` files (versions 5 and 7): real numeric variables, no cells, structures or objects.

The format is read here and not by ``scipy.io.loadmat``, which ends the whole process on one in 500 damaged files. Tests
hold both to the same values. A file is 128 bytes of header and elements: type and size as two uint32, content, padding
to 8 bytes; an element of type 15 is zlib-compressed, one of type 14 is a variable: flags, shape, name and numbers,
columns first.

``read_variables`` gives all of them as arrays. ``read`` takes a file as a data set: the variable with a usual label
name (``y``, ``label``, ...) is the labels, every other 2-D or 3-D one a modality. MATLAB users often put rows last;
where the labels say so, the axes are turned round and a note says it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import (
    MAX_RATIO,
    check_size,
    file_bytes,
    listed,
    numbers,
    printable,
    read_bytes,
    unpacked_limit,
)
from models.data.formats.csv_table import LABEL_NAMES
from models.data.formats.hdf5 import SIGNATURE
from models.data.formats.repairs import vectors

NAME = "matlab"
MATRIX, COMPRESSED = 14, 15
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
OTHER_CLASSES = {1: "cell", 2: "structure", 3: "object", 4: "char", 5: "sparse matrix", 16: "function", 17: "object"}


def fits(path: Path) -> bool:
    return path.suffix.lower() == ".mat"


def read_variables(path: str | Path) -> dict[str, np.ndarray]:
    """The numeric variables of a file, in its order.

    Raises FileNotFoundError, or ValueError naming the file and variable.
    """
    data = read_bytes(path)
    if data[:8] == SIGNATURE or b"MATLAB 7.3" in data[:128]:
        raise ValueError(f"{path} is a version 7.3 file: save it in MATLAB with the option -v7")
    if data[:10] != b"MATLAB 5.0" or len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
        raise ValueError(f"{path} is not a MATLAB file of version 5 or 7")
    order = "<" if data[126:128] == b"IM" else ">"
    found: dict[str, np.ndarray] = {}
    try:
        for kind, content in _elements(memoryview(data)[128:], order, unpacked_limit(len(data))):
            if kind != MATRIX:
                raise _Damaged(f"an element of type {kind} stands where a variable should be")
            name, values = _variable(content, order, path)
            if name in found:
                raise ValueError(f"{path} has two variables {name[:60]!r}")
            if name:  # the workspace of MATLAB functions has none
                found[name] = values
    except _Damaged as error:
        raise ValueError(f"{path} is not a complete MATLAB file: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no variables")
    return found


class _Damaged(Exception):
    """The rest of a sentence about the file."""


def _elements(data: memoryview, order: str, limit: int) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements that fill ``data``; those that are compressed are unpacked, ``limit`` bytes in
    all.
    """
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise _Damaged("it ends inside an element's header")
        first, size = (int(n) for n in np.frombuffer(data, order + "u4", 2, at))
        start, kind = at + 8, first
        if first >> 16:  # a small element: type and size share a word, the content follows in the next
            kind, size, start = first & 0xFFFF, first >> 16, at + 4
        if size > (4 if start == at + 4 else len(data) - start):
            raise _Damaged(f"an element claims {size} bytes, more than there are")
        content = data[start : start + size]
        if kind == COMPRESSED:
            content = _unpacked(content, limit)
            limit -= len(content)
            yield from _elements(content, order, 0)
            at = start + size
            continue
        yield kind, content
        at = at + 8 if start == at + 4 else start + size + -size % 8


def _unpacked(data: memoryview, limit: int) -> memoryview:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise _Damaged(str(error)) from error
    if len(content) > limit:
        raise _Damaged(f"it unpacks to more than {MAX_RATIO} times its size")
    if not unpacker.eof:
        raise _Damaged("a compressed variable ends early")
    return memoryview(content)


def _variable(data: memoryview, order: str, path: str | Path) -> tuple[str, np.ndarray]:
    """Name and values of a matrix element. Raises ValueError, naming it, when it is no array of real numbers."""
    parts = _elements(data, order, 0)
    flags = _numbers(*next(parts, (0, data[:0])), order)
    kind, complex_ = int(flags[0]) & 0xFF if len(flags) else 0, len(flags) and int(flags[0]) & 0x800
    shape = tuple(int(size) for size in _numbers(*next(parts, (0, data[:0])), order))
    name = printable(bytes(next(parts, (0, data[:0]))[1]).decode("latin-1"))
    if kind not in CLASSES or complex_:
        what = "complex" if complex_ else f"a {OTHER_CLASSES.get(kind, f'thing of class {kind}')}"
        raise ValueError(f"{path}: variable {name[:60]!r} must be numeric, it is {what}")
    values = _numbers(*next(parts, (0, data[:0])), order)
    if not 2 <= len(shape) <= 32 or min(shape) < 0 or math.prod(shape) != len(values):
        raise _Damaged(f"variable {name[:60]!r} of shape {shape} has {len(values)} values")
    dtype = np.dtype(bool) if len(flags) and int(flags[0]) & 0x200 else np.dtype(CLASSES[kind])
    check_size(len(values) * dtype.itemsize, file_bytes(path), path, name)
    with np.errstate(invalid="ignore"):
        return name, values.reshape(shape, order="F").astype(dtype)


def _numbers(kind: int, content: memoryview, order: str) -> np.ndarray:
    if kind not in TYPES:
        raise _Damaged(f"an element of type {kind} holds no numbers")
    dtype = np.dtype(order + TYPES[kind])
    if len(content) % dtype.itemsize:
        raise _Damaged("an element holds part of a number")
    return np.frombuffer(content, dtype)


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
