"""ICT-MMMO: 340 film reviews, sentiment 1 to 5, as MFN distributes them: 220 / 40 / 80.

Modalities ``audio`` (20 x 74) and ``video`` (20 x 36), aligned by word; padding is cut. ``text`` (20 x 300) exists for
valid and
test rows only: it cannot be trained on, so it is refused by name. Labels: ``y`` (regression); with a threshold of 3.5
two classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.data.assemble import assemble
from models.data.dataset import SPLITS, Dataset
from models.data.formats.mfn_hdf5 import joined
from models.data.formats.npy import read_npz
from models.data.sources.files import find

FILE, SHA256 = "mmmo.npz", "2f5e5896689ba988d692562e4bdf63deb8d967c1514062ce77a7c075689e3d61"
MODALITIES = ("audio", "video")


def load(seed: int = 0, modalities: Sequence[str] = ()) -> Dataset:
    """Raw values. Raises FileNotFoundError, or ValueError for unknown modalities and for text."""
    if "text" in modalities:
        raise ValueError("modality 'text' of 'mmmo' has no training rows: the public files hold valid and test only")
    path = find(FILE, SHA256)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for key, values in read_npz(path).items():
        name, _, split = key.rpartition("_")
        if name in (*MODALITIES, "y") and split in SPLITS:
            arrays.setdefault(name, {})[split] = values
    return assemble(joined(path, arrays, []), "mmmo", seed, modalities=modalities or MODALITIES, low=1, high=5)
