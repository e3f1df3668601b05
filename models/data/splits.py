"""Drawn splits: stratified for classes, by rank for regression targets, by group where rows belong together."""

from __future__ import annotations

import numpy as np
import torch

from models.data.dataset import SPLITS, Dataset

FRACTIONS = (0.6, 0.2)


def stratified_split(y: np.ndarray, seed: int, fractions: tuple[float, float] = FRACTIONS) -> np.ndarray:
    """Split codes [N], drawn per class: fractions are those of train and valid, the rest is test."""
    rng = np.random.default_rng(seed)
    split = np.full(len(y), SPLITS["test"], dtype=np.int64)
    for label in np.unique(y):
        _assign(split, rng.permutation(np.flatnonzero(y == label)), fractions)
    return split


def random_split(rows: int, seed: int, fractions: tuple[float, float] = FRACTIONS) -> np.ndarray:
    """Split codes [N] without regard to labels."""
    split = np.full(rows, SPLITS["test"], dtype=np.int64)
    _assign(split, np.random.default_rng(seed).permutation(rows), fractions)
    return split


def ranked_split(y: np.ndarray, seed: int, fractions: tuple[float, float] = FRACTIONS, bins: int = 10) -> np.ndarray:
    """Split codes [N] for a regression target [N]: stratified over ``bins`` equal parts of its order."""
    rank = np.argsort(np.argsort(y, kind="stable"), kind="stable")
    return stratified_split(rank * min(bins, max(1, len(y) // 5)) // max(1, len(y)), seed, fractions)


def group_split(groups: np.ndarray, seed: int, fractions: tuple[float, float] = FRACTIONS) -> np.ndarray:
    """Split codes [N] such that all rows of a group (a speaker, a video) fall on the same side."""
    names, codes = np.unique(groups, return_inverse=True)
    if len(names) < 3:
        raise ValueError(f"groups must be at least 3 for a three-way split, got {len(names)}")
    return random_split(len(names), seed, fractions)[codes]


def with_fewer_rows(data: Dataset, limit: int, seed: int) -> Dataset:
    """At most ``limit`` rows of each split, drawn by ``seed``, in the order that they have; the others are left out.

    Classes take turns, so that each has a row where ``limit`` allows. A larger limit keeps what a smaller one keeps.
    Raises ValueError for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 row, got {limit}")
    kept = []
    for code in SPLITS.values():
        rows = np.random.default_rng([seed, code]).permutation(np.flatnonzero(data.split.numpy() == code))
        if data.target.is_classes and data.labels is not None:
            rows = rows[np.argsort(_turns(data.labels.numpy()[rows]), kind="stable")]
        kept.append(rows[:limit])
    return data.select(torch.from_numpy(np.sort(np.concatenate(kept))))


def _turns(labels: np.ndarray) -> np.ndarray:
    """For each row how many rows of its class come before it."""
    turns = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turns[members] = np.arange(len(members))
    return turns


def _assign(split: np.ndarray, rows: np.ndarray, fractions: tuple[float, float]) -> None:
    train, valid = np.round(np.cumsum(fractions) * len(rows)).astype(int)
    split[rows[:train]] = SPLITS["train"]
    split[rows[train:valid]] = SPLITS["valid"]
