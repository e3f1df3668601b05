"""Checks that readers share: is it data at all, how much may it unpack to, are its numbers finite."""

from __future__ import annotations

import difflib
import gzip
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# A file may unpack to this much, and to this many times its own size beyond it: sparse data compresses a few hundred
# times, a bomb by far more.
FREE_BYTES = 1 << 30
MAX_RATIO = 200


def read_bytes(path: str | Path) -> bytes:
    """A file's content, unzipped when it is gzip.

    Raises FileNotFoundError, or ValueError where it is no data at all.
    """
    path = require_data(path)
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    limit = unpacked_limit(len(data))
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if len(content) > limit:
        raise ValueError(f"{path} unpacks to more than {MAX_RATIO} times its size; unpack it yourself if you trust it")
    return content


def require_data(path: str | Path) -> Path:
    """The path of a file that is there, not empty, and neither a web page nor a pointer to a file not fetched."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page, not data: the download failed")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not data: fetch the file itself")
    return path


def unpacked_limit(file_bytes: int) -> int:
    """Bytes that a file of this size may unpack to."""
    return FREE_BYTES + MAX_RATIO * file_bytes


def check_size(number: float, file_bytes: int, path: str | Path, key: str) -> None:
    """Raises ValueError when ``number`` bytes are more than a file of this size can honestly hold."""
    if number > unpacked_limit(file_bytes):
        raise ValueError(
            f"{path}: {key!r} claims {number / 2**30:.3g} GiB in a file of {file_bytes / 2**20:.3g} MiB; it is damaged"
        )


def file_bytes(path: str | Path) -> int:
    """Size of a file, or of all files directly in a folder."""
    path = Path(path)
    if path.is_dir():
        return sum(item.stat().st_size for item in path.iterdir() if item.is_file())
    return path.stat().st_size if path.exists() else 0


def require(content: Mapping[str, Any], key: str, path: str | Path, where: str = "") -> Any:
    """``content[key]``. Raises ValueError that lists the keys there are."""
    if key not in content:
        raise ValueError(f"{path}{where} has no {key!r}; it has {listed(content)}{suggestion(key, content)}")
    return content[key]


def printable(text: str) -> str:
    """``text`` with control characters escaped: names in a file must not write lines or colours to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean NAME?" for a misspelt one, else nothing."""
    close = difflib.get_close_matches(name, [str(other) for other in known], 1, 0.6)
    return f"; did you mean {printable(close[0])}?" if close else ""


def listed(names: Any) -> str:
    """Names for an error message: at most a dozen."""
    names = [printable(str(name)[:40]) for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def numbers(
    value: Any,
    path: str | Path,
    key: str,
    *,
    infinite: str = "refuse",
    nan: str = "refuse",
    notes: list[str] | None = None,
) -> np.ndarray:
    """``value`` as float32 of the same shape. Raises ValueError for what is not numeric or not finite.

    infinite, nan: "refuse", "keep", or "zero", which replaces them by 0 and says so in ``notes`` (the rule of MulT,
    MMSA and MultiBench for COVAREP's -inf).
    """
    array = np.asarray(value) if not isinstance(value, np.ndarray) else value
    if array.dtype.kind not in "fiub":
        kind = "objects" if array.dtype == object else array.dtype
        raise ValueError(f"{path}: {key!r} must be numeric, it holds {kind}")
    if array.size == 0:
        raise ValueError(f"{path}: {key!r} is empty, its shape is {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(array, dtype=np.float32)
    if array.dtype.kind in "iub" or np.isfinite(result).all():
        return result
    for name, bad, rule in (("NaN", np.isnan(result), nan), ("infinite", np.isinf(result), infinite)):
        count = int(bad.sum())
        if count and rule == "zero":
            result[bad] = 0
            if notes is not None:
                notes.append(f"{key}: {count} {name} values were set to 0")
        elif count and rule == "refuse":
            row = int(np.argwhere(bad)[0][0]) if bad.ndim else 0
            raise ValueError(
                f"{path}: {key!r} holds {count} values that are not finite ({name}), the first in row {row}"
            )
    return result
