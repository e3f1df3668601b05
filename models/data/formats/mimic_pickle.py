"""MIMIC-III's ``im.pk`` as MultiBench reads it: a table and a day of vital signs per stay.

``{"ep_tdata": [N, 24, 12], "adm_features_all": [N, 5], "adm_labels_all": [N, >= 6], "y_icd9": [N, 20]}``. Modalities
``static`` and ``series``; values that are not finite become 0. Labels: ``icd9_0`` ... ``icd9_19`` (diagnosis groups,
two classes each; FactorCL uses ``icd9_7``, the default) and ``mortality`` (six classes: the first of columns 1 to 5
that is set, else 0). Split: MultiBench's, rows shuffled by ``random.seed(10)``, a tenth valid, a tenth test, the rest
train.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import listed, numbers, require
from models.data.formats.repairs import vectors

NAME = "mimic"
SERIES, STATIC, DIAGNOSES, DEATHS = "ep_tdata", "adm_features_all", "y_icd9", "adm_labels_all"
DEFAULT_TASK = 7


def fits(content: Any) -> bool:
    return isinstance(content, dict) and SERIES in content


def from_content(content: Any, path: str | Path) -> Arrays:
    """Arrays of the unpickled ``content``. Raises ValueError naming the file and the key."""
    notes: list[str] = []
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a dictionary, it is a {type(content).__name__}")
    series, static = (
        numbers(require(content, key, path), path, key, infinite="zero", nan="zero", notes=notes)
        for key in (SERIES, STATIC)
    )
    if series.ndim != 3 or static.ndim != 2:
        raise ValueError(
            f"{path}: {SERIES!r} must be [N, T, D] and {STATIC!r} [N, D], got {series.shape}, {static.shape}"
        )
    rest = [key for key in content if key not in (SERIES, STATIC, DIAGNOSES, DEATHS)]
    if rest:
        notes.append(f"not used: {listed(rest)}")
    rows, steps = series.shape[:2]
    parts = {
        "static": vectors(static, "static", notes),
        "series": Part(series.reshape(rows * steps, -1), offsets_of(np.full(rows, steps))),
    }
    labels = _labels(content, path)
    return Arrays(str(path), NAME, parts, labels=labels, split=_split(rows), notes=notes).check()


def _labels(content: dict[str, Any], path: str | Path) -> dict[str, np.ndarray]:
    labels = {}
    if DIAGNOSES in content:
        groups = _table(content, DIAGNOSES, path, 1)
        order = sorted(range(groups.shape[1]), key=lambda task: task != DEFAULT_TASK)
        labels = {f"icd9_{task}": groups[:, task] for task in order}
    if DEATHS in content:
        deaths = _table(content, DEATHS, path, 6)[:, 1:6] > 0
        labels["mortality"] = np.where(deaths.any(1), deaths.argmax(1) + 1, 0)
    if not labels:
        raise ValueError(f"{path} has no labels {DIAGNOSES!r} or {DEATHS!r}; it has {listed(content)}")
    return labels


def _table(content: dict[str, Any], key: str, path: str | Path, columns: int) -> np.ndarray:
    table = numbers(content[key], path, key)
    if table.ndim != 2 or table.shape[1] < columns:
        raise ValueError(f"{path}: {key!r} must be [N, {columns} or more], got {table.shape}")
    return table


def _split(rows: int) -> np.ndarray:
    order = list(range(rows))
    random.Random(10).shuffle(order)
    split = np.zeros(rows, np.int64)
    split[order[: rows // 10]] = 1
    split[order[rows // 10 : rows // 5]] = 2
    return split
