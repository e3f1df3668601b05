"""A file that is replaced whole: whoever reads it, or kills the writer, finds the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """``write`` a file beside ``path`` and put it in its place; what was there becomes ``keep``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    write(beside)
    _flush(beside)
    if keep is not None and path.exists():
        # A link, not a rename: there is no moment without a file of this name.
        link = keep.with_name(keep.name + ".part")
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, keep)
    os.replace(beside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
