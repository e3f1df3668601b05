"""The logged curves of a run, including all times that it was resumed."""

from __future__ import annotations

import csv
from pathlib import Path


def history(out: Path, column: str) -> list[tuple[int, float]]:
    """(epoch, value) of a logged column."""
    values: dict[int, float] = {}
    for row in _rows(out):
        if row.get(column):
            values[int(row["epoch"])] = float(row[column])
    return sorted(values.items())


def epochs_of(out: Path) -> int:
    """The number of epochs of a run, including all times that it was resumed; 0 if no loss was logged."""
    return max((epoch + 1 for epoch, _ in history(out, "loss")), default=0)


def columns(out: Path) -> list[str]:
    """The names of all logged columns, in order of appearance."""
    return list(dict.fromkeys(name for row in _rows(out) for name in row if name not in ("epoch", "step")))


def _rows(out: Path) -> list[dict[str, str]]:
    paths = sorted(out.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    rows: list[dict[str, str]] = []
    for path in paths:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows
