"""scikit-learn's 8 x 8 digits as two modalities: the left and the right half of each image."""

from __future__ import annotations

import torch

from models.batch import Target
from models.data.dataset import Dataset, Modality
from models.data.splits import stratified_split


def load(seed: int = 0) -> Dataset:
    """1,797 images; halves [N, 32] scaled to [0, 1]; 60/20/20 stratified split drawn by seed."""
    from sklearn.datasets import load_digits

    images, y = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16
    halves = [
        Modality(name, part.reshape(len(part), 32), shape=(8, 4))
        for name, part in (("left", pixels[:, :, :4]), ("right", pixels[:, :, 4:]))
    ]
    split = torch.from_numpy(stratified_split(y, seed))
    return Dataset("digits", tuple(halves), torch.tensor(y, dtype=torch.long), Target.classes(10), split)
