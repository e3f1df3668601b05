"""MMSA's pickles of MOSI, MOSEI, SIMS: ``unaligned_50.pkl``, ``aligned_50.pkl``, ``unaligned_39.pkl``.

Per split: ``text`` [N, 50, 768] (BERT), ``audio`` and ``vision`` [N, T, D], ``audio_lengths`` and ``vision_lengths``
(unaligned files), ``text_bert`` [N, 3, 50] (token ids, mask, token types), ``regression_labels`` [N],
``classification_labels`` [N], ``regression_labels_{T,A,V}`` (SIMS), ``raw_text``, ``annotations`` and ``id``
("video$_$clip"). Padded on the right. Infinite audio becomes 0.

Lengths: the file's own where it has them; for text the mask of ``text_bert``; else up to the last frame that is not
zero. In an aligned file the modalities keep equal lengths. ``text_bert``'s ids are the modality ``tokens``, used only
when named: BERT's vocabulary says the same as ``text``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats import pickled
from models.data.formats.arrays import Arrays, Part, codes, offsets_of, strings
from models.data.formats.checks import numbers
from models.data.formats.repairs import bounds, cut

NAME = "mmsa"
LABELS = (
    "regression_labels",
    "classification_labels",
    "regression_labels_T",
    "regression_labels_A",
    "regression_labels_V",
)


def fits(content: Any) -> bool:
    """Splits that hold ``regression_labels`` or ``classification_labels``."""
    if not pickled.has_splits(content):
        return False
    part = next(iter(content.values()))
    return isinstance(part, dict) and any(key in part for key in LABELS)


def from_content(content: Any, path: str | Path) -> Arrays:
    """Arrays of the unpickled ``content``. Raises ValueError naming the file, the split and the key."""
    arrays = pickled.joined(content, path, NAME, _read)
    if arrays.optional:
        arrays.notes.append("text_bert is the modality 'tokens': name it to use it in place of text")
    if arrays.ids and all("$_$" in name for name in arrays.ids):
        arrays.groups = codes([name.split("$_$")[0] for name in arrays.ids])
    return arrays


def _read(part: dict[str, Any], where: str, notes: list[str]) -> Arrays:
    values = {name: pickled.frames(part, name, where, notes) for name in pickled.MODALITIES}
    mask, tokens = _bert(part, where, notes)
    given = {name: _lengths(part, f"{name}_lengths", array, where) for name, array in values.items()}
    if mask is not None and given["text"] is None and values["text"].shape[:2] == mask.shape:
        given["text"] = bounds(mask)[1] * mask.any(1)
    stops = {name: _stop(array, given[name], name, notes) for name, array in values.items()}
    if len({array.shape[:2] for array in values.values()}) == 1 and given["audio"] is None and given["vision"] is None:
        common = np.max(list(stops.values()), axis=0)
        parts = pickled.aligned(values, np.zeros_like(common), common, notes)
    else:
        parts = {n: cut(array, np.zeros_like(stops[n]), stops[n], n, notes) for n, array in values.items()}
    labels = {key: pickled.label_column(part, key, where) for key in LABELS if key in part}
    texts = {key: strings(part[key], where, key) for key in ("raw_text",) if key in part}
    known = {*values, *LABELS, "raw_text", "text_bert", "id", "ids", "annotations", *(f"{n}_lengths" for n in values)}
    pickled.leftovers(part, known, notes)
    ids = pickled.row_names(part, where, notes)
    kinds = {key: "classes" if key == "classification_labels" else "regression" for key in labels}
    return Arrays(where, NAME, parts, optional=tokens, labels=labels, kinds=kinds, texts=texts, ids=ids)


def _lengths(part: dict[str, Any], key: str, values: np.ndarray, where: str) -> np.ndarray | None:
    """Lengths [N] that the file states, or None. Raises ValueError when they do not fit its frames."""
    if key not in part:
        return None
    lengths = numbers(np.array(part[key]).reshape(-1), where, key)
    if lengths.shape != (len(values),) or (lengths != np.round(lengths)).any():
        raise ValueError(f"{where}: {key!r} must be {len(values)} whole numbers, got {lengths.shape}")
    if lengths.min() < 0 or lengths.max() > values.shape[1]:
        raise ValueError(
            f"{where}: {key!r} must lie between 0 and {values.shape[1]} steps, "
            f"got {lengths.min():g} to {lengths.max():g}"
        )
    return lengths.astype(np.int64)


def _stop(values: np.ndarray, given: np.ndarray | None, name: str, notes: list[str]) -> np.ndarray:
    """Lengths [N]: 0 where all frames are zero; never shorter than what the file's own lengths and frames say."""
    start, last = bounds((values != 0).any(2))
    last = np.where(start < values.shape[1], last, 0)
    if given is None:
        return last
    beyond = int((last > given).sum())
    if beyond and name != "text":
        notes.append(f"{name}: {beyond} rows have frames beyond their stated length; they are left out")
    return np.where(last > 0, given, 0)


def _bert(part: dict[str, Any], where: str, notes: list[str]) -> tuple[np.ndarray | None, dict[str, Part]]:
    """The mask [N, T] and the token ids of ``text_bert``."""
    if "text_bert" not in part:
        return None, {}
    bert = numbers(part["text_bert"], where, "text_bert")
    if bert.ndim != 3 or bert.shape[1] != 3:
        raise ValueError(f"{where}: 'text_bert' must be [rows, 3, steps], got {bert.shape}")
    ids, mask = bert[:, 0], bert[:, 1] > 0
    if ids.min() < 0 or ids.max() > 2**24 or (ids != np.round(ids)).any():
        raise ValueError(
            f"{where}: 'text_bert' must hold token ids in its first row, got {ids.min():g} to {ids.max():g}"
        )
    return mask, {"tokens": Part(ids[mask].astype(np.int64), offsets_of(mask.sum(1)))}
