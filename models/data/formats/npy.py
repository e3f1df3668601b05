"""``.npy`` arrays in files and in the zip archives that numpy calls ``.npz``: without pickle, and with sizes checked
first.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from models.data.formats.checks import MAX_RATIO, check_size, require_data, unpacked_limit

MAX_MEMBERS = 100_000


def read_npy(path: str | Path) -> np.ndarray:
    """The array of a ``.npy`` file. Raises FileNotFoundError, or ValueError naming the file."""
    path = require_data(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        return _array(file, size, path, path.name)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a ``.npz``, in file order.

    Raises FileNotFoundError, or ValueError for a damaged or hostile archive.
    """
    path = require_data(path)
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise ValueError(f"{path} has {len(members)} members, more than {MAX_MEMBERS}")
            if sum(member.file_size for member in members) > unpacked_limit(size):
                raise ValueError(
                    f"{path} unpacks to more than {MAX_RATIO} times its size; save it uncompressed to use it"
                )
            arrays = {}
            for member in members:
                key = member.filename.removesuffix(".npy")
                if key in arrays:
                    raise ValueError(f"{path} has two arrays {key[:80]!r}")
                with archive.open(member) as file:
                    arrays[key] = _array(file, member.file_size, path, key)
            return arrays
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    except (zlib.error, EOFError, OSError, KeyError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error


def _array(file: IO[bytes], size: int, path: Path, key: str) -> np.ndarray:
    """One ``.npy`` of ``size`` bytes, its header is compared with what follows before memory is taken."""
    shape, fortran, dtype, header = _header(file, path, key)
    if dtype.hasobject:
        raise ValueError(f"{path} cannot be read without pickle: {key[:80]!r} holds Python objects")
    if dtype.names or dtype.subdtype or dtype.itemsize == 0 or dtype.kind not in "biufcSU":
        raise ValueError(f"{path}: {key[:80]!r} must hold numbers or strings, its dtype is {str(dtype)[:60]}")
    needed = math.prod(shape) * dtype.itemsize
    check_size(needed, size, path, key)
    if needed != size - header:
        raise ValueError(
            f"{path} is not a complete file: {key[:80]!r} of {shape} needs {needed} bytes, it has {size - header}"
        )
    data = file.read(needed)
    if len(data) != needed or file.read(1):
        raise ValueError(f"{path} is not a complete file: {key[:80]!r} ends after {len(data)} of {needed} bytes")
    values = np.frombuffer(bytearray(data), dtype)
    if dtype.kind == "b":
        values = values.view(np.uint8) != 0
    if dtype.kind == "U" and values.size and values.view(dtype.byteorder.replace("|", "=") + "u4").max() > 0x10FFFF:
        raise ValueError(f"{path}: {key[:80]!r} holds characters that do not exist")
    return values.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), copy=False)


def _header(file: IO[bytes], path: Path, key: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length in bytes of a header."""
    try:
        version = np.lib.format.read_magic(file)
        width = 2 if version == (1, 0) else 4
        raw = file.read(width)
        length = int.from_bytes(raw, "little")
        if length > 10_000 or version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError("its header is malformed")
        # numpy parses version 3 headers (UTF-8) as it does version 2; data of one number type needs neither.
        reader: Any = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(io.BytesIO(raw + file.read(length)), max_header_size=10_000)
    except Exception as error:  # numpy evaluates the header as Python: there is no list of what it may raise
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a complete file: {key[:80]!r} is no .npy array ({reason})") from error
    if len(shape) > 32 or any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise ValueError(f"{path}: {key[:80]!r} has a malformed shape")
    return shape, bool(fortran), dtype, 6 + 2 + width + length
