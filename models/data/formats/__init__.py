"""File formats: each module reads one into Arrays and knows no data set. ``read`` finds out which one a file has.

A module has NAME, ``fits`` and ``read(path)``; those of pickles have ``fits(content)`` and ``from_content(content,
path)``, so that a file is unpickled once. To add a format: its module, and its line in PATHS or PICKLES.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from models.data import safe_pickle
from models.data.formats import (
    acl17_pickle,
    affect_pickle,
    avmnist_npy,
    csd,
    csv_table,
    declare_lab,
    idx,
    irfl_csv,
    matlab,
    mfn_hdf5,
    mimic_pickle,
    mmsa_pickle,
    mult_pickle,
    mustard_json,
    npz,
    wav,
)
from models.data.formats.arrays import Arrays, Part
from models.data.formats.checks import listed, printable, require_data
from models.data.formats.hdf5 import SIGNATURE

# In the order in which they are tried: the more particular first.
PATHS: tuple[ModuleType, ...] = (
    npz,
    irfl_csv,
    csv_table,
    csd,
    mfn_hdf5,
    matlab,
    wav,
    mustard_json,
    avmnist_npy,
    declare_lab,
    idx,
)
PICKLES: tuple[ModuleType, ...] = (mimic_pickle, mmsa_pickle, mult_pickle, affect_pickle, acl17_pickle)
FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (*PATHS, *PICKLES)}

_HEADS = {b"PK\x03\x04": npz, SIGNATURE: mfn_hdf5, b"MATLAB 5.0": matlab, b"RIFF": wav}


def read(path: str | Path, format: str | None = None) -> Arrays:
    """The content of a file or folder in any known format, found out from its name and first bytes where none is named.

    Raises FileNotFoundError when it is not there; ImportError when a format needs a library that is not installed;
    ValueError, one sentence that names the file and the key, for everything else that can be wrong with it.
    """
    path = Path(path)
    if format and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    module = FORMATS[format] if format else detect(path)
    try:
        if module is not None and module not in PICKLES:
            return module.read(path)
        content = safe_pickle.load(require_data(path))
        return (module or _pickled(content, path)).from_content(content, path)
    except (OSError, ImportError):
        raise
    except ValueError as error:
        raise ValueError(printable(str(error))) from error
    except Exception as error:
        # Readers check what they use; whatever a hostile file provokes beyond that still ends as one sentence.
        reason = str(error).splitlines()[0][:160] if str(error) else ""
        raise ValueError(printable(f"{path} is damaged: {type(error).__name__} {reason}".rstrip())) from error


def detect(path: Path) -> ModuleType | None:
    """The format of a file or folder; None for a pickle, whose content decides.

    Raises ValueError for an unknown one.
    """
    if path.is_file():
        head = _head(path)
        for start, module in _HEADS.items():
            if head.startswith(start):
                return csd if module is mfn_hdf5 and csd.fits(path) else module
        if idx.looks_like(head):
            return idx
        if head[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".pk", ".p"):
            return None
    for module in PATHS:
        if module.fits(path):
            return module
    raise ValueError(f"{path} is in no format that is known here; known are {', '.join(FORMATS)}")


def _head(path: Path) -> bytes:
    require_data(path)
    with path.open("rb") as file:
        return file.read(16)


def _pickled(content: Any, path: Path) -> ModuleType:
    for module in PICKLES:
        if module.fits(content):
            return module
    keys = listed(content) if isinstance(content, dict) else f"a {type(content).__name__}"
    names = ", ".join(module.NAME for module in PICKLES)
    raise ValueError(f"{path} is a pickle of no layout that is known here ({names}); it holds {keys}")


__all__ = ["FORMATS", "Arrays", "Part", "detect", "read"]
