"""``two-digit`` from scikit-learn's 8 x 8 digits: needs no file, and trains in seconds."""

from __future__ import annotations

from models.data.dataset import Dataset
from models.data.sources.two_digit import dataset, small_pool


def load(seed: int = 0, target: str = "") -> Dataset:
    """6,000 rows [N, 8 * 16]; targets as in ``two-digit``."""
    return dataset(*small_pool(), "two-digit-small", seed, target)
