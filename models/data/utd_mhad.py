"""UTD-MHAD: 27 actions seen by a skeleton tracker (60-d) and an inertial sensor (6-d), two unaligned
sequences.

The cross-subject split comes with the file: even subjects are the test set, subject 7 the validation set.
"""

from __future__ import annotations

import os
from pathlib import Path

from models.data.base import PairedData
from models.data.npz import labels, modality, read_arrays, splits


def default_path() -> Path:
    """``utd_mhad.npz`` under MI_KERNELS_DATA, or in ``../shared/data`` beside the repository."""
    folder = os.environ.get("MI_KERNELS_DATA")
    root = Path(folder) if folder else Path(__file__).resolve().parents[3] / "shared" / "data"
    return root / "utd_mhad.npz"


def load_utd_mhad(path: str | Path | None = None) -> PairedData:
    """861 recordings, split 323/108/430, standardised per feature on the training frames."""
    path = Path(path) if path else default_path()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; set MI_KERNELS_DATA to the folder that holds utd_mhad.npz")
    arrays = read_arrays(path)
    if "label" not in arrays:
        raise ValueError(f"{path} has no array 'label'")
    y, num_classes = labels(arrays["label"])
    first, second = modality(arrays, "skeleton"), modality(arrays, "inertial")
    return PairedData("utd-mhad", first, second, y, splits(arrays, y.numpy(), 0), num_classes).standardised()
