"""FactorCL's synthetic generator with a normal mixing, which keeps the latents apart better than a uniform one."""

from __future__ import annotations

from models.data.dataset import Dataset
from models.data.sources.synthetic import labelled_from


def load(seed: int = 0, target: str = "") -> Dataset:
    """4,000 rows; targets as in ``synthetic``."""
    return labelled_from(target, seed, mixing="gaussian")
