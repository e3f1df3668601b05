"""MulT's pickles: ``{mosi|mosei_senti|iemocap}_data.pkl`` (aligned) and ``..._data_noalign.pkl``.

The keys of MultiBench's affect pickles, but the three modalities of a ``noalign`` file have their own numbers of steps.
Padded with zeros on the left. MulT feeds the padding to its network; here it goes: per modality, or together where the
file is aligned. Infinite audio becomes 0. IEMOCAP's one-hot labels [N, 4, 2] become four labels of two classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats import pickled
from models.data.formats.affect_pickle import fits as is_affect
from models.data.formats.arrays import Arrays
from models.data.formats.checks import numbers, require
from models.data.formats.repairs import unpad

NAME = "mult"
EMOTIONS = ("neutral", "happy", "sad", "angry")


def fits(content: Any) -> bool:
    """An affect pickle whose modalities have different lengths, or whose labels are IEMOCAP's."""
    if not is_affect(content):
        return False
    part = next(iter(content.values()))
    steps = {np.shape(part[name])[1:2] for name in pickled.MODALITIES}
    return len(steps) > 1 or np.shape(part["labels"])[1:] == (len(EMOTIONS), 2)


def from_content(content: Any, path: str | Path) -> Arrays:
    """Arrays of the unpickled ``content``. Raises ValueError naming the file, the split and the key."""
    return pickled.joined(content, path, NAME, _read)


def _read(part: dict[str, Any], where: str, notes: list[str]) -> Arrays:
    values = {name: pickled.frames(part, name, where, notes) for name in pickled.MODALITIES}
    if len({array.shape[:2] for array in values.values()}) == 1:
        start = np.min([pickled.first_steps(array) for array in values.values()], axis=0)
        parts = pickled.aligned(values, start, np.full(len(start), values["text"].shape[1]), notes)
    else:
        parts = {name: unpad(array, "left", name, notes) for name, array in values.items()}
    pickled.leftovers(part, {*values, "labels", "id", "ids"}, notes)
    labels, classes = _labels(part, where)
    return Arrays(where, NAME, parts, labels=labels, classes=classes, ids=pickled.row_names(part, where, notes))


def _labels(part: dict[str, Any], where: str) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    if np.shape(require(part, "labels", where))[1:] != (len(EMOTIONS), 2):
        return {"labels": pickled.label_column(part, "labels", where)}, {}
    chosen = numbers(part["labels"], where, "labels").argmax(2)
    return (
        {emotion: chosen[:, i].astype(np.int64) for i, emotion in enumerate(EMOTIONS)},
        {emotion: (f"not {emotion}", emotion) for emotion in EMOTIONS},
    )
