"""Fewer labels: the same rows, a drawn share of the training labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from models.data.dataset import SPLITS, UNUSED, Dataset


def with_share_of_labels(data: Dataset, share: float, seed: int, *, keep: bool = True) -> Dataset:
    """A data set in which ``share`` of the labelled training rows keep their label, drawn by ``seed``.

    Of every class at least one row keeps it. A larger share keeps all that a smaller one keeps. Validation and test
    rows keep theirs. keep: False takes the training rows without a label out of training, those included that had none
    before.
    Raises ValueError for a share outside (0, 1] and for data without labels.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    rows = data.labelled_rows("train").numpy()
    labels = data.labels
    assert labels is not None
    strata = labels.numpy()[rows] if data.target.is_classes else np.zeros(len(rows), np.int64)
    rng = np.random.default_rng(seed)
    kept = []
    for stratum in np.unique(strata):
        members = rng.permutation(rows[strata == stratum])
        kept.append(members[: max(1, round(share * len(members)))])
    labelled = torch.ones(len(data), dtype=torch.bool) if data.labelled is None else data.labelled.clone()
    train = data.split == SPLITS["train"]
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.from_numpy(np.concatenate(kept))] = True
    labelled &= ~train | chosen
    split = data.split if keep else data.split.masked_fill(train & ~labelled, UNUSED)
    return replace(data, split=split, labelled=None if bool(labelled.all()) else labelled)
