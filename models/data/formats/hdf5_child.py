"""Run as a script: reads HDF5 files in a process of its own, because the HDF5 library can hang or crash on damaged
ones.

``python hdf5_child.py OUT LIMIT FILE...`` writes all datasets of the files to OUT, one ``.npy`` after another, and
prints one line of JSON: ``[[{"name", "text"}...], ...]`` by file, or ``{"error", "file"}``. Imports h5py and numpy
alone, to start fast.
"""

from __future__ import annotations

import json
import sys
from typing import IO, Any

import h5py
import numpy as np

MAX_DEPTH, MAX_OBJECTS = 8, 1_000_000


def read_file(path: str, limit: float, out: IO[bytes] | None = None) -> list[dict[str, Any]]:
    """Names of all datasets of a file, in order; numbers go to ``out`` as ``.npy``, strings into the entry's "text".

    Raises ValueError for links to other files, datasets of other types, and more than ``limit`` bytes in all.
    """
    found: list[dict[str, Any]] = []
    left = limit
    with h5py.File(path, "r") as file:
        groups = [("", file)]
        while groups:
            prefix, group = groups.pop()
            if prefix.count("/") > MAX_DEPTH:
                raise ValueError(f"groups nest deeper than {MAX_DEPTH} at {prefix[:80]!r}")
            deeper = []
            for key in group:
                name = f"{prefix}{key}"
                if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    raise ValueError(f"{name!r} is a link to elsewhere, which is not followed")
                item = group[key]
                if isinstance(item, h5py.Group):
                    deeper.append((f"{name}/", item))
                elif isinstance(item, h5py.Dataset):
                    left -= _read(name, item, left, found, out)
                if len(found) + len(groups) > MAX_OBJECTS:
                    raise ValueError(f"it has more than {MAX_OBJECTS} datasets and groups")
            groups.extend(reversed(deeper))
    return found


def _read(name: str, data: h5py.Dataset, left: float, found: list[dict[str, Any]], out: IO[bytes] | None) -> float:
    """Appends one dataset; returns its bytes."""
    if data.is_virtual or data.external:
        raise ValueError(f"{name!r} lies in another file, which is not read")
    size = float(np.prod([float(n) for n in data.shape or ()])) * data.dtype.itemsize
    if size > left:
        raise ValueError(
            f"{name!r} claims {size / 2**30:.3g} GiB, more than a file of this size can hold; it is damaged"
        )
    if h5py.check_string_dtype(data.dtype):
        found.append({"name": name, "text": _text(data)})
        return size
    if data.dtype.kind not in "fiub" or data.shape is None:
        raise ValueError(f"{name!r} must be numeric, its type is {str(data.dtype)[:60]}")
    values = data[()]
    found.append({"name": name})
    if out is not None:
        np.save(out, np.ascontiguousarray(values), allow_pickle=False)
    return size


def _text(data: h5py.Dataset) -> list[str]:
    values = data.asstr(errors="replace")[()]
    return [str(value)[:100_000] for value in np.asarray(values, dtype=object).reshape(-1)[:100_000]]


def _limit_memory(limit: float) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    most = int(limit) + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(out: str, limit: str, *paths: str) -> None:
    _limit_memory(float(limit))
    listing = []
    with open(out, "wb") as file:
        for path in paths:
            print(json.dumps({"file": path}), flush=True)
            try:
                listing.append(read_file(path, float(limit), file))
            except Exception as error:  # whatever a damaged file provokes becomes the sentence about it
                print(json.dumps({"file": path, "error": str(error)[:300] or type(error).__name__}), flush=True)
                return
    print(json.dumps(listing), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
