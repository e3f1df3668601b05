"""Two pictures of two handwritten digits each, whose shared and unique parts are known and on which linear models fail.

    left picture  = [an image of digit s, an image of digit a]
    right picture = [another image of digit s, an image of digit b]        s, a, b independent and uniform on 0..9
    label         = (s odd) + 2 (a odd) + 4 (b odd), 8 classes

With images that tell their digit, I(X1;X2) = ln 10, I(X1;X2;Y) = ln 2 (the parity of s is shared), and
I(X1;Y|X2) = I(X2;Y|X1) = ln 2 (those of a and b are unique). A parity is no linear function of pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.batch import Target
from models.data.dataset import Dataset, Modality
from models.data.formats.npy import read_npz
from models.data.sources.files import find

ROWS = (4000, 1000, 1000)  # train, valid, test
POOL = 20_000  # images of MNIST that are drawn from
TARGETS = ("all", "shared", "unique")


def load(seed: int = 0, target: str = "") -> Dataset:
    """6,000 rows of MNIST, or of scikit-learn's 8 x 8 digits where MNIST's file is not there; [N, 28 * 56] or
    [N, 8 * 16] in [0, 1]. No image occurs in two splits.

    target: "all" (default, 8 classes), "shared" (the parity of s alone, 2 classes) or "unique" (those of a and b, 4).
    """
    try:
        found = read_npz(find("mnist.npz"))
    except FileNotFoundError:
        return dataset(*small_pool(), "two-digit", seed, target)
    images, digits = found["x_train"][:POOL], found["y_train"][:POOL]
    return dataset(images.astype(np.float32) / 255, digits.astype(np.int64), "two-digit", seed, target)


def small_pool() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's images [1797, 8, 8] in [0, 1] and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


def dataset(images: np.ndarray, digits: np.ndarray, name: str, seed: int, target: str = "") -> Dataset:
    """Pairs of pictures of ``images`` [N, H, W] in [0, 1], which show ``digits`` [N]. Raises ValueError for another
    target."""
    if target and target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    # Images go to the splits as rows do.
    cuts = np.cumsum(ROWS)[:-1] * len(order) // sum(ROWS)
    parts = [_pairs(images, digits, pool, n, rng) for pool, n in zip(np.split(order, cuts), ROWS, strict=True)]
    left, right, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    odd = values % 2
    chosen = {"all": [0, 1, 2], "shared": [0], "unique": [1, 2]}[target or "all"]
    labels = sum(odd[:, column] << place for place, column in enumerate(chosen))
    height, width = left.shape[1:]
    modalities = tuple(
        Modality(name, _flat(pictures), shape=(height, width)) for name, pictures in (("left", left), ("right", right))
    )
    split = torch.repeat_interleave(torch.arange(3), torch.tensor(ROWS))
    y = torch.from_numpy(np.asarray(labels, np.int64))
    return Dataset(name, modalities, y, Target.classes(2 ** len(chosen)), split)


def _pairs(
    images: np.ndarray, digits: np.ndarray, pool: np.ndarray, rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right pictures [rows, H, 2 W] of images of ``pool``, and the digits s, a, b [rows, 3]."""
    of_digit = [pool[digits[pool] == digit] for digit in range(10)]
    values = rng.integers(10, size=(rows, 3))

    def drawn(column: int) -> np.ndarray:
        return images[np.array([rng.choice(of_digit[digit]) for digit in values[:, column]])]

    left = np.concatenate([drawn(0), drawn(1)], 2)
    right = np.concatenate([drawn(0), drawn(2)], 2)
    return left, right, values


def _flat(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures.reshape(len(pictures), -1))
