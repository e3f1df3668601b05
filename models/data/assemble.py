"""From the arrays of a file to a Dataset: which label, what kind of target, which rows train."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch

from models.batch import Target
from models.data.dataset import SPLITS, Dataset, Modality
from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import listed, printable, suggestion
from models.data.splits import group_split, random_split, ranked_split, stratified_split

PADDING, UNKNOWN = "<pad>", "<unk>"
MIN_GROUPS = 4  # fewer leave one of the three splits without a row
_WORD = re.compile(r"[\w']+|[^\w\s]")
_log = logging.getLogger(__name__)


def assemble(
    arrays: Arrays,
    name: str,
    seed: int = 0,
    *,
    target: str = "",
    kind: str = "",
    split: str = "",
    modalities: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Dataset:
    """A Dataset of ``arrays``: all its modalities, or those named (texts and optional ones only when they are named).

    target: which label, the first by default. kind: "classes" or "regression"; by default what the format says, else
    classes where all labels are whole numbers. split: another one of the file; without any it is drawn, by group where
    there are groups, else stratified by label. low, high: the range of a regression scale.
    A file without labels makes a Dataset without: models that need none train on it, the others refuse it by name.
    Raises ValueError that names the file and what it lacks: a label by name, modalities, training rows, a second class.
    """
    chosen = split_of(arrays, split)
    values, what = labels_of(arrays, target, kind, low, high)
    labelled = (
        None
        if np.isfinite(values).reshape(len(values), -1).all()
        else np.isfinite(values).reshape(len(values), -1).all(1)
    )
    notes = list(arrays.notes)
    if what.kind == "none":
        notes.append(f"no labels y, it has {_parts(arrays)}: only models that need none can train")
    if labelled is not None:
        notes.append(f"{int((~labelled).sum())} rows have no label (NaN)")
        values = np.where(labelled if values.ndim == 1 else labelled[:, None], values, 0)
    drawn = chosen is None
    if chosen is None:
        chosen = _drawn(arrays, values, what, seed)
    if not (chosen == SPLITS["train"]).any():
        raise ValueError(f"{arrays.path} has no train rows (split code 0)")
    parts = _modalities(arrays, modalities, chosen == SPLITS["train"])
    if what.is_classes:
        values, what = _numbered(arrays, target, values, labelled, what)
    for note in notes:
        _log.warning("%s: %s", arrays.path, printable(note))
    if not drawn and not (chosen == SPLITS["test"]).any():
        _log.warning("%s has no test rows (split code 2)", arrays.path)
    return Dataset(
        name,
        tuple(modality(key, part, arrays.texts) for key, part in parts.items()),
        None if what.kind == "none" else torch.from_numpy(values.astype(np.int64 if what.is_classes else np.float32)),
        what,
        torch.from_numpy(chosen.astype(np.int64)),
        None if labelled is None else torch.from_numpy(labelled),
        arrays.ids,
        None if arrays.groups is None else torch.from_numpy(arrays.groups.astype(np.int64)),
    )


def modality(name: str, part: Part, texts: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Modality:
    """``part`` in tensors. texts: by modality name, the strings that tokens were made from."""
    return Modality(
        name,
        torch.from_numpy(np.ascontiguousarray(part.values)),
        None if part.offsets is None else torch.from_numpy(part.offsets),
        part.shape,
        None if part.present is None or part.present.all() else torch.from_numpy(part.present),
        None if part.table is None else torch.from_numpy(part.table),
        len(part.words),
        tuple(texts[name]) if name in texts else _texts(part),
    )


def _texts(part: Part) -> tuple[str, ...]:
    """The rows' words joined by spaces; empty for a part without words."""
    if not part.words or part.offsets is None:
        return ()
    rows = zip(part.offsets[:-1], part.offsets[1:], strict=True)
    return tuple(" ".join(part.words[int(token)] for token in part.values[start:stop]) for start, stop in rows)


def _parts(arrays: Arrays) -> str:
    return listed([*arrays.modalities, *arrays.optional, *arrays.texts])


def labels_of(arrays: Arrays, target: str = "", kind: str = "", low: float | None = None, high: float | None = None):
    """The label called ``target`` and the Target it makes; classes are not yet renumbered."""
    if not arrays.labels and (target or kind):
        raise ValueError(f"{arrays.path} has no labels {target or 'y'}; it has {_parts(arrays)}")
    if not arrays.labels:
        return np.zeros(len(arrays), np.float32), Target.none()
    key = target or next(iter(arrays.labels))
    if key not in arrays.labels:
        known_labels = listed(arrays.labels) + suggestion(key, arrays.labels)
        raise ValueError(f"{arrays.path} has no label {key!r}; it has {known_labels}")
    values = arrays.labels[key]
    known = values[np.isfinite(values)]
    if not len(known):
        raise ValueError(f"{arrays.path}: label {key!r} is NaN in every row")
    whole = bool((np.round(known) == known).all())
    if np.isinf(values).any():
        raise ValueError(f"{arrays.path}: label {key!r} holds infinite values")
    kind = kind or arrays.kinds.get(key) or ("classes" if whole and values.ndim == 1 else "regression")
    if kind not in ("classes", "regression"):
        raise ValueError(f"{arrays.path}: the kind of {key!r} must be classes or regression, got {kind[:40]!r}")
    if kind == "regression":
        return values.astype(np.float32), Target.regression(1 if values.ndim == 1 else values.shape[1], low, high)
    if values.ndim != 1:
        raise ValueError(f"{arrays.path}: {key!r} must hold one class label per row, [N] or [N, 1]; got {values.shape}")
    if not whole:
        raise ValueError(
            f"{arrays.path}: {key!r} must hold integer class labels, it is a regression target: bin it first"
        )
    if len(np.unique(known)) < 2:
        raise ValueError(f"{arrays.path}: {key!r} must hold at least two classes, it is {known[0]:g} in every row")
    return values, Target.classes(len(np.unique(known)))


def _numbered(arrays: Arrays, target: str, values: np.ndarray, labelled: np.ndarray | None, what: Target):
    """Class numbers from 0 and their names."""
    key = target or next(iter(arrays.labels))
    known = np.unique(values if labelled is None else values[labelled])
    given = arrays.classes.get(key, ())
    if given and known.min() >= 0 and known.max() < len(given):
        names = tuple(given[int(code)] for code in known)
    else:
        names = tuple(f"{code:g}" for code in known)
    return np.searchsorted(known, np.clip(values, known[0], known[-1])).astype(np.int64), replace(what, names=names)


def split_of(arrays: Arrays, split: str = "") -> np.ndarray | None:
    """The split called so, or the file's own; None where it has none."""
    if not split:
        return arrays.split
    if split not in arrays.splits:
        raise ValueError(f"{arrays.path} has no split {split!r}; it has {listed(arrays.splits)}")
    return arrays.splits[split]


def _drawn(arrays: Arrays, values: np.ndarray, what: Target, seed: int) -> np.ndarray:
    if arrays.groups is not None and len(np.unique(arrays.groups)) >= MIN_GROUPS:
        return group_split(arrays.groups, seed)
    if what.is_classes:
        return stratified_split(values, seed)
    if what.kind == "none":
        return random_split(len(values), seed)
    return ranked_split(values, seed) if values.ndim == 1 else random_split(len(values), seed)


def _modalities(arrays: Arrays, names: Sequence[str], train: np.ndarray) -> dict[str, Part]:
    found = {**arrays.modalities, **arrays.optional}
    if not names:
        names = tuple(arrays.modalities)
    if not names:
        raise ValueError(
            f"{arrays.path} has no modality in numbers; its texts become tokens when they are named as modalities: "
            f"{listed(arrays.texts)}"
        )
    parts = {}
    for name in names:
        if name not in found and name not in arrays.texts:
            have = listed([*found, *arrays.texts]) + suggestion(name, [*found, *arrays.texts])
            raise ValueError(f"{arrays.path}: modality {name!r} is missing; the file has {have}")
        parts[name] = found[name] if name in found else tokens(arrays.texts[name], train)
    return parts


def tokens(texts: Sequence[str], train: np.ndarray, most: int = 20_000) -> Part:
    """Words and punctuation marks as numbers: 0 padding, 1 unknown, then the words of the training rows by frequency.

    texts: [N] strings; an empty one has no token, so that the row does not have the modality. train: bool [N].
    """
    words = [_WORD.findall(text.lower()) for text in texts]
    counts = Counter(word for row, used in zip(words, train, strict=True) if used for word in row)
    known = sorted(counts, key=lambda word: (-counts[word], word))[:most]
    number = {word: i for i, word in enumerate((PADDING, UNKNOWN, *known))}
    values = np.array([number.get(word, 1) for row in words for word in row], np.int64)
    return Part(values, offsets_of([len(row) for row in words]), words=tuple(number))
