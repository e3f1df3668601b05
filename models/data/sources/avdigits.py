"""Audio-visual digits: MNIST pictures paired with spoken digits of the same class (Free Spoken Digit Dataset).

Modalities ``image`` (28 x 28, in [0, 1]) and ``audio`` (log-mel sequences of 40 features). 55,000 / 5,000 / 10,000
pairs; no picture and no recording is in two splits. All pairs take about 0.7 GB; ``avdigits-small`` is the first tenth
of each split.
"""

from __future__ import annotations

import numpy as np

from models.data.assemble import assemble
from models.data.dataset import SPLITS, Dataset
from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import numbers, require
from models.data.formats.npy import read_npz
from models.data.formats.repairs import pictures
from models.data.sources.files import find

PAIRS = ("avdigits_pairs.npz", "b174d60c09cc3d44abd92d6c533ce61540e27bd69cee284cb08c7a4624bec3d8")
PICTURES = ("mnist.npz", "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64")
SOUNDS = ("fsdd_logmel40.npz", "e3bab617ef04360196e75c14b5c9f839fe7c13c0d0e419fb6d384a10a264121c")


def load(seed: int = 0, share: int = 1) -> Dataset:
    """Raw values of the first 1 / ``share`` of each split.

    Raises FileNotFoundError, or ValueError for a damaged file.
    """
    pairs, images, sounds = (read_npz(find(*file)) for file in (PAIRS, PICTURES, SOUNDS))
    path = find(PAIRS[0])
    parts = {}
    for split in SPLITS:
        chosen = [require(pairs, f"{split}_{name}", path).astype(np.int64) for name in ("mnist", "fsdd")]
        parts[split] = [rows[: len(rows) // share] for rows in chosen]
    # The test pictures are MNIST's own; train and valid share its training file.
    source = {split: "test" if split == "test" else "train" for split in SPLITS}
    values = np.concatenate([images[f"x_{source[split]}"][parts[split][0]] for split in SPLITS])
    labels = np.concatenate([images[f"y_{source[split]}"][parts[split][0]] for split in SPLITS])
    frames = Part(numbers(sounds["logmel"], path, "logmel"), offsets_of(sounds["length"].astype(np.int64)))
    heard = np.concatenate([parts[split][1] for split in SPLITS])
    if not np.array_equal(sounds["label"][heard], labels):
        raise ValueError(f"{path} pairs pictures with sounds of another digit: the files do not belong together")
    result = Arrays(str(path), "npz", labels={"digit": labels.astype(np.int64)})
    result.modalities = {"image": pictures(values, path, "image", []), "audio": frames.select(heard)}
    result.split = np.repeat(list(SPLITS.values()), [len(parts[split][0]) for split in SPLITS])
    return assemble(result.check(), "avdigits", seed)
