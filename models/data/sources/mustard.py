"""MUStARD, text only: 690 utterances of television series with what was said before, sarcastic or not.

Modalities ``utterance`` and ``context``, tokens numbered on the training rows. Splits ``fold0`` (default) to ``fold4``,
MUStARD's speaker-dependent folds: 552 / 138; a seventh of the training rows, drawn by seed and class, becomes valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.data.assemble import assemble
from models.data.dataset import SPLITS, Dataset
from models.data.formats.arrays import Arrays, codes, strings
from models.data.formats.checks import require
from models.data.formats.npy import read_npz
from models.data.sources.files import find
from models.data.splits import stratified_split

FILE, SHA256 = "mustard_text.npz", "b98e05eb24b11c243965d31d5be623f841a6af04088c4e004f3cbfebe566ce64"
MODALITIES = ("utterance", "context")
VALID_SHARE = 1 / 7


def load(seed: int = 0, split: str = "fold0", modalities: Sequence[str] = ()) -> Dataset:
    """Raises FileNotFoundError, or ValueError for an unknown split or modality."""
    path = find(FILE, SHA256)
    content = read_npz(path)
    folds = {f"fold{i}": row for i, row in enumerate(require(content, "fold_is_test", path))}
    if split not in folds:
        raise ValueError(f"split of 'mustard' must be one of {', '.join(folds)}; got {split!r}")
    result = Arrays(str(path), "npz", labels={"sarcasm": require(content, "sarcasm", path).astype(np.int64)})
    result.classes["sarcasm"] = ("plain", "sarcastic")
    result.texts = {name: strings(require(content, name, path), path, name) for name in MODALITIES}
    result.ids = tuple(strings(require(content, "utt_id", path), path, "utt_id"))
    result.groups = codes(strings(require(content, "speaker", path), path, "speaker"))
    result.split = _split(folds[split], result.labels["sarcasm"], seed)
    return assemble(result.check(), "mustard", seed, modalities=modalities or MODALITIES)


def _split(test: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    split = np.full(len(test), SPLITS["test"], np.int64)
    rest = np.flatnonzero(test == 0)
    drawn = stratified_split(labels[rest], seed, (1 - VALID_SHARE, VALID_SHARE))
    split[rest] = np.where(drawn == SPLITS["train"], SPLITS["train"], SPLITS["valid"])
    return split
