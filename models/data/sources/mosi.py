"""CMU-MOSI: 2,199 utterances of 93 videos, sentiment in [-3, 3]; features of the ACL 2017 release.

Modalities: ``text`` and ``video`` (100-d vectors), ``audio`` (73-d vectors), ``tokens`` (words with GloVe-300
embeddings).

A leak to know: the networks that made ``text`` and ``video`` were trained on the labels of the ACL 2017 training set.
On the official split 558 of 686 test utterances belong to it. Which uses are clean:

| split | train / valid / test | modalities |
|---|---|---|
| ``heldout31`` (default) | 511 / 79 / 162 | all: no row was seen by those networks |
| ``acl17`` | 1447 / 752 | all; valid is a tenth of the training videos, and as familiar to the networks |
| ``official`` | 1284 / 229 / 686 | ``tokens`` and ``audio`` alone; ``text`` and ``video`` are refused |

Labels: ``sentiment`` (regression, default) or ``polarity`` (two classes).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from models.data.assemble import assemble
from models.data.dataset import SPLITS, Dataset
from models.data.formats.arrays import Arrays, Part, offsets_of, strings
from models.data.formats.checks import numbers, require
from models.data.formats.npy import read_npz
from models.data.sources.files import find

FILE, SHA256 = "mosi_utterance.npz", "75daa6f72e99c9b8e8ff3537f6e7269c98741fce1dac6f56ec556eeb5295e144"
VECTORS = ("text", "audio", "video")
LEAKING = ("text", "video")
SPLIT_NAMES = ("heldout31", "acl17", "official")
_log = logging.getLogger(__name__)


def load(seed: int = 0, target: str = "", split: str = "heldout31", modalities: Sequence[str] = ()) -> Dataset:
    """Raw values; modalities text, audio, video by default, tokens and audio on the official split.

    Raises FileNotFoundError, or ValueError for an unknown split or target and for leaking modalities on the official
    split.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"split of 'mosi' must be one of {', '.join(SPLIT_NAMES)}; got {split!r}")
    refuse_leaks("mosi", split, modalities, "use tokens and audio, or the split heldout31 or acl17")
    if not modalities:
        modalities = ("tokens", "audio") if split == "official" else VECTORS
    arrays = _arrays()
    arrays.split = arrays.splits[split]
    if split == "acl17":
        _log.warning(
            "mosi: acl17 has no validation rows; a tenth of its training videos is used, which text and video know"
        )
        arrays.split = with_valid(arrays, seed)
    return assemble(arrays, "mosi", seed, target=target, modalities=modalities, low=-3, high=3)


def _arrays() -> Arrays:
    path = find(FILE, SHA256)
    content = read_npz(path)
    result = Arrays(str(path), "npz", kinds={"sentiment": "regression"})
    for name in VECTORS:
        result.modalities[name] = Part(numbers(require(content, name, path), path, name))
    ids, lengths = (
        require(content, "tokens", path).astype(np.int64),
        require(content, "token_len", path).astype(np.int64),
    )
    keep = np.arange(ids.shape[1]) < lengths[:, None]
    result.optional["tokens"] = Part(
        ids[keep],
        offsets_of(keep.sum(1)),
        table=numbers(require(content, "glove", path), path, "glove"),
        words=tuple(strings(require(content, "vocab", path), path, "vocab")),
    )
    result.labels = {"sentiment": require(content, "y", path), "polarity": require(content, "polarity", path)}
    result.classes["polarity"] = ("negative", "positive")
    result.splits = {name: require(content, f"split_{name}", path).astype(np.int64) for name in SPLIT_NAMES}
    result.ids = tuple(strings(require(content, "utt_id", path), path, "utt_id"))
    result.groups = require(content, "video_index", path).astype(np.int64)
    return result.check()


def refuse_leaks(data: str, split: str, modalities: Sequence[str], instead: str) -> None:
    """Raises ValueError for text and video on the official split."""
    leaking = [name for name in modalities if name in LEAKING]
    if split == "official" and leaking:
        raise ValueError(
            f"modalities {', '.join(leaking)} of {data!r} leak on the official split: the networks that made them were "
            f"trained on 558 of its 686 test utterances; {instead}"
        )


def with_valid(arrays: Arrays, seed: int) -> np.ndarray:
    """Split codes with all utterances of a tenth of the training videos moved to valid."""
    split, groups = arrays.splits["acl17"].copy(), arrays.groups
    assert groups is not None
    videos = np.random.default_rng(seed).permutation(np.unique(groups[split == SPLITS["train"]]))
    split[np.isin(groups, videos[: len(videos) // 10]) & (split == SPLITS["train"])] = SPLITS["valid"]
    return split
