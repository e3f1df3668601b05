"""CMU-MOSI as dialogues: every utterance with those before it in its video, at most ten steps of ``text``, ``audio``
and ``video`` that are aligned; features and labels are those of ``mosi``.

Splits, by video: ``acl17`` (default, 62 / 31; valid is a tenth of the training videos) and ``official`` with ``audio``
alone: what ``mosi`` says of its leak holds here.

Labels: ``sentiment`` (regression, default) or ``polarity`` (two classes), of the last utterance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.data.assemble import assemble
from models.data.dataset import Dataset
from models.data.formats.arrays import Arrays, Part, offsets_of, strings
from models.data.formats.checks import numbers, require
from models.data.formats.npy import read_npz
from models.data.sources.files import find
from models.data.sources.mosi import VECTORS, refuse_leaks, with_valid

FILE, SHA256 = "mosi_dialogue.npz", "828bff452cc729beb5d5bc02d84b619c44cf78256e193c85d1e2331b84cf558e"
STEPS = 10
SPLIT_NAMES = ("acl17", "official")
LABELS = {"sentiment": "y", "polarity": "polarity"}


def load(seed: int = 0, target: str = "", split: str = "acl17", modalities: Sequence[str] = ()) -> Dataset:
    """Raw values. Raises FileNotFoundError, or ValueError for an unknown split or target and for leaking modalities on
    the official split."""
    if split not in SPLIT_NAMES:
        raise ValueError(f"split of 'mosi-dialogue' must be one of {', '.join(SPLIT_NAMES)}; got {split!r}")
    modalities = modalities or (("audio",) if split == "official" else VECTORS)
    refuse_leaks("mosi-dialogue", split, modalities, "use audio, or the split acl17")
    arrays = _arrays()
    arrays.split = with_valid(arrays, seed) if split == "acl17" else arrays.splits[split]
    return assemble(arrays, "mosi-dialogue", seed, target=target, modalities=modalities, low=-3, high=3)


def _arrays() -> Arrays:
    path = find(FILE, SHA256)
    content = read_npz(path)
    lengths = require(content, "length", path).astype(np.int64)
    video = np.repeat(np.arange(len(lengths)), lengths)  # of every utterance
    place = np.arange(len(video)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # within its video
    steps = np.minimum(place + 1, STEPS)
    index = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps) + np.repeat(place + 1 - steps, steps)
    result = Arrays(str(path), "npz", kinds={"sentiment": "regression"}, groups=video)
    for name in VECTORS:
        values = numbers(require(content, name, path), path, name)
        result.modalities[name] = Part(values[np.repeat(video, steps), index], offsets_of(steps))
    result.labels = {key: require(content, source, path)[video, place] for key, source in LABELS.items()}
    result.classes["polarity"] = ("negative", "positive")
    result.splits = {n: require(content, f"split_{n}", path).astype(np.int64)[video] for n in SPLIT_NAMES}
    names = strings(require(content, "video_names", path), path, "video_names")
    result.ids = tuple(f"{names[v]}[{p}]" for v, p in zip(video, place, strict=True))
    return result.check()
