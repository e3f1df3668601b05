"""UTD-MHAD: 27 actions seen by a skeleton tracker (60-d) and an inertial sensor (6-d), two unaligned
sequences.

Skeletons are made comparable between people and places: coordinates relative to the hip centre, in units of the
recording's mean distance between shoulder and hip centre. The cross-subject split comes with the file: even
subjects are the test set, subject 7 the validation set.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from models.batch import Target
from models.data.dataset import Dataset, Modality
from models.data.npz import labels, modality, read_arrays, splits

SHOULDER_CENTRE, HIP_CENTRE = 1, 3


def default_path() -> Path:
    """``utd_mhad.npz`` under MI_KERNELS_DATA, or in ``../shared/data`` beside the repository."""
    folder = os.environ.get("MI_KERNELS_DATA")
    root = Path(folder) if folder else Path(__file__).resolve().parents[3] / "shared" / "data"
    return root / "utd_mhad.npz"


def load_utd_mhad(path: str | Path | None = None) -> Dataset:
    """861 recordings, split 323/108/430; skeletons normalised."""
    path = Path(path) if path else default_path()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; set MI_KERNELS_DATA to the folder that holds utd_mhad.npz")
    arrays = read_arrays(path)
    if "label" not in arrays:
        raise ValueError(f"{path} has no array 'label'")
    y, num_classes = labels(arrays["label"])
    first, second = modality(arrays, "skeleton"), modality(arrays, "inertial")
    first = normalise_skeletons(first)
    return Dataset("utd-mhad", (first, second), y, Target.classes(num_classes), splits(arrays, y.numpy(), 0))


def normalise_skeletons(skeletons: Modality) -> Modality:
    """Frames [sum T, joints * 3] relative to the hip centre and in units of the torso.

    A recording's torso is the mean over its frames of the distance between shoulder centre and hip centre.
    """
    joints = skeletons.values.reshape(len(skeletons.values), -1, 3)
    torso = (joints[:, SHOULDER_CENTRE] - joints[:, HIP_CENTRE]).norm(dim=1)
    centred = joints - joints[:, HIP_CENTRE, None]
    values = centred / _mean_over_sample(torso, skeletons)[:, None, None]
    return Modality(skeletons.name, values.flatten(1), skeletons.offsets, skeletons.shape)


def _mean_over_sample(frames: Tensor, modality: Modality) -> Tensor:
    """For every frame the mean of a value [sum T] over the frames of its sample."""
    rows = modality.rows_of_frames()
    sums = torch.zeros(len(modality), dtype=frames.dtype).index_add(0, rows, frames)
    return (sums / rows.bincount(minlength=len(modality)))[rows]
