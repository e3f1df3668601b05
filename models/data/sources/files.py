"""Where the files of the data sets lie, and whether they are the ones that the sources were written for."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


def folder() -> Path:
    """The folder of the real data: MI_KERNELS_DATA, or ``../shared/data`` beside the repository."""
    named = os.environ.get("MI_KERNELS_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[4] / "shared" / "data"


def find(name: str, sha256: str = "") -> Path:
    """The path of a file of ``folder``. Warns when its content is not the known one. Raises FileNotFoundError."""
    path = folder() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file: {path}; set MI_KERNELS_DATA to the folder that holds {name}. "
            "The repository does not contain it, see docs/own-arrays.md"
        )
    if sha256 and digest(path) != sha256:
        _log.warning("%s is not the version that this data set was written for: its SHA-256 differs", path)
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
