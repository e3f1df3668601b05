"""MultiBench's affect pickles: MOSI, MOSEI, UR-FUNNY (``humor.pkl``) and MUStARD (``sarcasm.pkl``).

``{"train" | "valid" | "test": {"vision": [N, T, dv], "audio": [N, T, da], "text": [N, T, 300], "labels": [N, 1, 1],
"id": [N]}}``, aligned by word and padded with zeros on the left. Read as MultiBench's loader does: rows without any
text go, infinite audio becomes 0, and the three modalities start at the first word. A modality that is zero throughout
a row is missing there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats import pickled
from models.data.formats.arrays import Arrays

NAME = "affect"


def fits(content: Any) -> bool:
    """Three modalities of equal length and ``labels``."""
    if not pickled.has_splits(content):
        return False
    part = next(iter(content.values()))
    return isinstance(part, dict) and {"labels", *pickled.MODALITIES} <= part.keys()


def from_content(content: Any, path: str | Path) -> Arrays:
    """Arrays of the unpickled ``content``. Raises ValueError naming the file, the split and the key."""
    return pickled.joined(content, path, NAME, _read)


def _read(part: dict[str, Any], where: str, notes: list[str]) -> Arrays:
    values = {name: pickled.frames(part, name, where, notes) for name in pickled.MODALITIES}
    for key, value in part.items():
        if key not in values and isinstance(value, np.ndarray) and value.ndim == 3 and key not in ("labels", "id"):
            values[key] = pickled.frames(part, key, where, notes)
    steps = {name: array.shape[:2] for name, array in values.items()}
    if len(set(steps.values())) != 1:
        raise ValueError(f"{where}: aligned modalities must have equal rows and steps, got {steps}")
    labels = pickled.label_column(part, "labels", where)
    ids = pickled.row_names(part, where, notes)
    spoken = (values["text"] != 0).any((1, 2))
    if len(labels) != len(spoken) or (ids and len(ids) != len(spoken)):
        raise ValueError(f"{where}: 'labels' has {len(labels)} rows and 'id' {len(ids)}, 'text' has {len(spoken)}")
    if not spoken.all():
        notes.append(f"{int((~spoken).sum())} rows without any text were left out, as MultiBench does")
        values = {name: array[spoken] for name, array in values.items()}
        labels = labels[spoken]
        ids = tuple(name for name, kept in zip(ids, spoken, strict=False) if kept)
    if not spoken.any():
        raise ValueError(f"{where}: 'text' is zero in every row")
    start = pickled.first_steps(values["text"])
    parts = pickled.aligned(values, start, np.full(len(start), values["text"].shape[1]), notes)
    pickled.leftovers(part, {*values, "labels", "id", "ids"}, notes)
    return Arrays(where, NAME, modalities=parts, labels={"labels": labels}, ids=ids)
