"""Converts any supported format to ``.npz`` without pickles."""

from __future__ import annotations

from pathlib import Path

from models.data import formats
from models.data.formats import npz
from models.data.formats.arrays import Arrays
from models.data.formats.checks import printable
from models.data.sources import utd_mhad

# Folders of original files with one row per file, which the source of the data set can assemble.
ORIGINALS = {"utd-mhad": utd_mhad.from_mat}


def convert(source: str | Path, out: str | Path, format: str | None = None, *, overwrite: bool = False) -> str:
    """Writes ``source``, a file or folder in any known format, to ``out`` (``.npz``, without pickle); returns what was
    done.

    format: one of ``formats.FORMATS`` or ORIGINALS; detected if None. Repairs are recorded in the file's ``notes``.
    overwrite: replace ``out`` if it exists. Raises FileNotFoundError, or ValueError naming the file and the key, or
    ``out`` if it does not end in ``.npz`` or exists.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"out must end in .npz, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"out must differ from the input file {source}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: replace it with --overwrite, or choose another name")
    arrays = ORIGINALS[format](source) if format in ORIGINALS else formats.read(source, format)
    npz.write(arrays, out)
    return f"wrote {out}: {summary(arrays)}"


def summary(arrays: Arrays) -> str:
    """One line with rows, modalities, labels and all repairs."""
    named = {
        "modalities": [*arrays.modalities, *arrays.optional],
        "texts": list(arrays.texts),
        "labels": list(arrays.labels),
    }
    parts = [f"{len(arrays)} rows from {arrays.format}"]
    parts += [f"{kind} {', '.join(names)}" for kind, names in named.items() if names]
    return printable("; ".join([*parts, *arrays.notes]))
