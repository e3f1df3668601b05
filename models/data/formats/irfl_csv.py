"""IRFL's tables: ``{idiom,metaphor,simile}_understanding_task.csv``, one file or a folder of them.

Columns ``phrase``, ``answer`` and ``distractors`` (Python lists of picture addresses), ``figurative_type``, ``type``,
and ``query`` and ``definition`` for idioms. The pictures lie on other people's servers and are not fetched: what is
read here is text and labels. Rows of one phrase form a group: split by group, or phrases leak from training to test.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays, codes
from models.data.formats.checks import listed
from models.data.formats.csv_table import columns_of

NAME = "irfl"
REQUIRED = ("phrase", "answer", "distractors")
TEXTS = ("phrase", "query", "definition")
MAX_LIST = 20_000


def fits(path: Path) -> bool:
    """A folder with such tables, or one of them by name."""
    pattern = "*_understanding_task.csv"
    return any(path.glob(pattern)) if path.is_dir() else path.match(pattern)


def read(path: str | Path) -> Arrays:
    """Arrays of one table or of all in a folder.

    Raises FileNotFoundError, or ValueError naming the file and the column.
    """
    path = Path(path)
    files = sorted(path.glob("*_understanding_task.csv")) if path.is_dir() else [path]
    tables = [_columns(file) for file in files]
    if not tables:
        raise ValueError(f"{path} has no files named like idiom_understanding_task.csv")
    result = Arrays(str(path), NAME)
    result.notes.append("the pictures are addresses on other servers; only texts and labels are read")
    for name in TEXTS:
        if any(name in table for table in tables):
            result.texts[name] = [cell for table in tables for cell in table.get(name, [""] * len(table["phrase"]))]
    kinds = [kind for file, table in zip(files, tables, strict=True) for kind in _kinds(file, table)]
    names, numbers = np.unique(kinds, return_inverse=True)
    result.labels["figurative_type"] = numbers.astype(np.int64)
    result.classes["figurative_type"] = tuple(str(name) for name in names)
    for name in ("answer", "distractors"):
        lists = [_list(cell, file, name, row) for file, table in zip(files, tables, strict=True)
                 for row, cell in enumerate(table[name])]  # fmt: skip
        result.texts[name] = ["\n".join(items) for items in lists]
    result.groups = codes(result.texts["phrase"])
    return result.check()


def _columns(file: Path) -> dict[str, list[str]]:
    table = columns_of(file)
    for name in REQUIRED:
        if name not in table:
            raise ValueError(f"{file} has no column {name!r}; it has {listed(table)}")
    return table


def _kinds(file: Path, table: dict[str, list[str]]) -> list[str]:
    if "figurative_type" in table:
        return [kind.strip().lower() for kind in table["figurative_type"]]
    return [file.name.split("_")[0]] * len(table["phrase"])


def _list(cell: str, file: Path, name: str, row: int) -> list[str]:
    """A list of strings as Python writes it."""
    try:
        value = ast.literal_eval(cell) if len(cell) <= MAX_LIST else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{file}: {name!r} must hold a list of addresses in row {row + 1}, got {cell[:40]!r}")
    return value
