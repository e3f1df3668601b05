"""Plain CSV tables: one row a line, a header, columns grouped into modalities by name.

``NAME_0, NAME_1, ...`` or ``NAME.0, ...`` are the features of modality NAME; other numeric columns make up the modality
``table``. Columns with a usual name are the labels (``y``, ``label``, ...), the split and the ids; columns of text are
kept as texts. A file without a header gets the columns ``c0``, ``c1``, ...
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from models.data.formats.arrays import SPLIT_CODES, Arrays
from models.data.formats.checks import listed, numbers, require_data
from models.data.formats.repairs import vectors

NAME = "csv"
LABEL_NAMES = ("y", "label", "labels", "target", "class", "sarcasm")
ID_NAMES = ("id", "ids", "utt_id", "key")
_FEATURE = re.compile(r"(.+?)[_.]?(\d+)")
MAX_CELL = 1_000_000


def fits(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def rows_of(path: str | Path) -> list[list[str]]:
    """All rows that are not empty, the header included.

    Raises FileNotFoundError, or ValueError naming the file and line.
    """
    path = require_data(path)
    before = csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            rows = [row for row in reader if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start}") from error
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: row {number + 1} has {len(row)} cells, the first row has {len(rows[0])}")
    return rows


def columns_of(path: str | Path) -> dict[str, list[str]]:
    """Columns by name, in order. Raises ValueError when a name repeats or nothing follows the header."""
    rows = rows_of(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    names = [cell.strip() for cell in rows[0]]
    if any(_is_number(cell) for cell in names):
        names = [f"c{i}" for i in range(len(names))]
    else:
        rows = rows[1:]
    repeated = [name for name in names if names.count(name) > 1] if len(names) < 1000 else []
    if repeated or len(set(names)) < len(names):
        raise ValueError(f"{path} has several columns {listed(sorted(set(repeated)))}")
    if not rows:
        raise ValueError(f"{path} has a header and no rows")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def read(path: str | Path) -> Arrays:
    """Arrays of one table. Raises FileNotFoundError, or ValueError naming the file, the column and the row."""
    columns = columns_of(path)
    result = Arrays(str(path), NAME)
    groups: dict[str, list[np.ndarray]] = {}
    for name, cells in columns.items():
        values = _numeric(cells, path, name)
        if name.lower() == "split":
            result.split = _split(cells, path)
        elif name.lower() in ID_NAMES:
            result.ids = tuple(cells)
        elif name.lower() in LABEL_NAMES:
            _label(result, name, cells, values)
        elif values is None:
            result.texts[name] = cells
        else:
            match = _FEATURE.fullmatch(name)
            groups.setdefault(match[1] if match else "table", []).append(values)
    for name, features in groups.items():
        # A headerless table's columns c0, c1, ... are nobody's features in particular.
        own = "table" if "c0" in columns and name == "c" else name
        result.modalities[own] = vectors(numbers(np.stack(features, 1), path, own), own, result.notes)
    return result.check()


def _label(result: Arrays, name: str, cells: list[str], values: np.ndarray | None) -> None:
    if values is not None:
        result.labels[name] = values
        return
    names, codes = np.unique(cells, return_inverse=True)
    result.labels[name] = codes.astype(np.int64)
    result.classes[name] = tuple(str(label) for label in names)


def _split(cells: list[str], path: str | Path) -> np.ndarray:
    known = {**SPLIT_CODES, "": -1, "unused": -1, **{str(code): code for code in (-1, 0, 1, 2)}}
    wrong = sorted({cell for cell in cells if cell.strip().lower() not in known})
    if wrong:
        raise ValueError(f"{path}: 'split' must hold train, valid, test or 0, 1, 2; got {listed(wrong)}")
    return np.array([known[cell.strip().lower()] for cell in cells])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numeric(cells: list[str], path: str | Path, name: str) -> np.ndarray | None:
    """The column as floats; None when it is text.

    Raises ValueError when a few cells of a numeric column are not numbers.
    """
    wrong = [i for i, cell in enumerate(cells) if not _is_number(cell)]
    if not wrong:
        return np.array([float(cell) for cell in cells])
    if len(wrong) <= len(cells) // 2 and name.lower() not in ("split", *ID_NAMES, *LABEL_NAMES):
        raise ValueError(f"{path}: column {name!r} has no number in row {wrong[0] + 1}: {cells[wrong[0]][:40]!r}")
    return None
