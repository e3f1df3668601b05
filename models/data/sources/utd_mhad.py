"""UTD-MHAD: 27 actions of 8 people, 861 recordings, three sequences of each.

Modalities ``skeleton`` (20 joints x 3), ``inertial`` (6-d, not aligned with the other two) and ``depth`` (24 x 32
pictures, in [0, 1]). Skeletons are made comparable between people and places: coordinates relative to the hip centre,
in units of the recording's mean distance between shoulder and hip centre. Cross-subject split 323 / 108 / 430: even
subjects test, subject 7 valid.

``from_mat`` builds the same arrays from the authors' MATLAB files (``convert FOLDER OUT.npz --format utd-mhad``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data.assemble import assemble
from models.data.dataset import Dataset, Modality
from models.data.formats import npz
from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import numbers, require
from models.data.formats.matlab import read_variables
from models.data.formats.repairs import sequences
from models.data.sources.files import find, folder

FILE, SHA256 = "utd_mhad.npz", "def2824918a17c33afdff5e5358e821fd88f37b0ae51f3d737232080bd375880"
MODALITIES = ("skeleton", "inertial", "depth")
SHOULDER_CENTRE, HIP_CENTRE = 1, 3
DEPTH_SHAPE, DEPTH_UNIT = (24, 32), 16  # mean of 10 x 10 pixels, in units of 16 millimetres, so that it fits 8 bits
_VARIABLES = {"skeleton": "d_skel", "inertial": "d_iner", "depth": "d_depth"}
_FILE = re.compile(r"a(\d+)_s(\d+)_t(\d+)_(skeleton|inertial|depth)\.mat")


def default_path() -> Path:
    """``utd_mhad.npz`` under MI_KERNELS_DATA, or in ``../shared/data`` beside the repository."""
    return folder() / FILE


def load(seed: int = 0, path: str | Path | None = None) -> Dataset:
    """Raw values, skeletons normalised.

    Raises FileNotFoundError, or ValueError naming the key that is missing or malformed.
    """
    path = Path(path) if path else find(FILE, SHA256)
    arrays = npz.read(path)
    arrays.notes.clear()
    for name in MODALITIES:
        require(arrays.modalities, name, path)
    data = assemble(arrays, "utd-mhad", seed, modalities=MODALITIES)
    first = normalise_skeletons(data["skeleton"])
    return replace(data, modalities=(first, *data.modalities[1:]))


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


def from_mat(path: str | Path) -> Arrays:
    """Arrays of a folder with the authors' ``a1_s1_t1_skeleton.mat`` and so on, a row a recording that has any of them.

    Raises FileNotFoundError, or ValueError naming the file and the variable.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    found: dict[tuple[int, ...], dict[str, Path]] = {}
    for file in sorted(path.iterdir()):
        if match := _FILE.fullmatch(file.name):
            found.setdefault(tuple(map(int, match.groups()[:3])), {})[match[4]] = file
    if not found:
        raise ValueError(f"{path} has no files named like a1_s1_t1_skeleton.mat")
    keys = sorted(found)
    result = Arrays(str(path), "utd-mhad", ids=tuple("a{}_s{}_t{}".format(*key) for key in keys))
    for name in MODALITIES:
        items = [_frames(found[key][name], name) if name in found[key] else np.zeros((0, 0)) for key in keys]
        if any(len(item) for item in items):
            result.modalities[name] = _part(items, path, name, result.notes)
    result.labels["label"] = np.array([action for action, _, _ in keys])
    subjects = np.array([subject for _, subject, _ in keys])
    result.groups, result.split = subjects, np.where(subjects % 2 == 0, 2, np.where(subjects == 7, 1, 0))
    return result.check()


def _part(items: list[np.ndarray], path: Path, name: str, notes: list[str]) -> Part:
    if name != "depth":
        return sequences(items, path, name, notes)
    frames = np.concatenate([item for item in items if item.size]) / np.float32(255)
    return Part(frames, offsets_of([len(item) if item.size else 0 for item in items]), DEPTH_SHAPE)


def _frames(file: Path, name: str) -> np.ndarray:
    """Frames [T, D] of one recording. Depth pictures become 24 x 32 averages."""
    key = _VARIABLES[name]
    values = numbers(require(read_variables(file), key, file), file, key)
    if name == "inertial":
        if values.ndim != 2 or values.shape[1] != 6:
            raise ValueError(f"{file}: {key!r} must be [T, 6], got {values.shape}")
        return values
    size = (20, 3) if name == "skeleton" else (DEPTH_SHAPE[0] * 10, DEPTH_SHAPE[1] * 10)
    if values.ndim != 3 or values.shape[:2] != size:
        raise ValueError(f"{file}: {key!r} must be [{size[0]}, {size[1]}, T], got {values.shape}")
    frames = np.moveaxis(values, 2, 0)
    if name == "depth":
        blocks = frames.reshape(len(frames), DEPTH_SHAPE[0], 10, DEPTH_SHAPE[1], 10).mean((2, 4))
        frames = np.clip(np.round(blocks / DEPTH_UNIT), 0, 255)
    return np.ascontiguousarray(frames.reshape(len(frames), -1))
