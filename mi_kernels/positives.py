"""Rows of the supervised contrastive losses: several positives an anchor, which enter through sums over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.dot_critic import api
from .ops.dot_critic.primitives import accumulate_dtype


def check_views(features: Tensor, labels: Tensor | None, base_temperature: float, contrast_mode: str) -> int:
    """The number of items; raises ValueError naming the argument."""
    if not isinstance(features, Tensor) or features.dim() < 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must have shape [B, views, D], got {shape}")
    if 0 in features.shape:
        raise ValueError(f"features must not be empty, got shape {tuple(features.shape)}")
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"contrast_mode must be 'all' or 'one', got {contrast_mode!r}")
    if not base_temperature > 0:
        raise ValueError(f"base_temperature must be positive, got {base_temperature}")
    items = features.shape[0]
    if labels is not None and labels.numel() != items:
        raise ValueError(f"labels must hold {items} entries, one an item, got shape {tuple(labels.shape)}")
    return items


def class_rows(
    anchors: Tensor,
    contrast: Tensor,
    row_class: Tensor,
    col_class: Tensor,
    *,
    own: Tensor | None,
    aligned: bool = False,
    scale: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """log sum of all candidates but the own one, minus the mean score of the same class: [A], and which exist.

    anchors [A, D], contrast [C, D]; classes count from 0; own [A] is the column that is the anchor itself, `aligned`
    says that own_i is i. A row without a positive is 0 and False.
    """
    wide = accumulate_dtype(anchors.dtype)
    number = int(torch.maximum(row_class.max(), col_class.max())) + 1
    sums = torch.zeros(number, contrast.shape[1], dtype=wide, device=anchors.device)
    sums = sums.index_add(0, col_class, contrast.to(wide))
    towards = sums[row_class]
    weight = torch.bincount(col_class, minlength=number)[row_class].to(wide)
    if own is not None:
        towards, weight = towards - contrast[own].to(wide), weight - 1
    return weighted_rows(anchors, contrast, towards, weight, own=own, aligned=aligned, scale=scale, backend=backend)


def weighted_rows(
    anchors: Tensor,
    contrast: Tensor,
    towards: Tensor,
    weight: Tensor,
    *,
    own: Tensor | None,
    aligned: bool = False,
    scale: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """class_rows from towards_i = sum_p m_ip contrast_p [A, D] and weight_i = sum_p m_ip [A]."""
    wide = accumulate_dtype(anchors.dtype)
    valid = weight > 1e-6
    positive = (anchors.to(wide) * towards).sum(-1) * scale / torch.where(valid, weight, 1)
    if own is None or aligned:
        pairs = "off_diagonal" if aligned else "all"
        found = api.statistics(anchors, contrast, scale, pairs=pairs, backend=backend)
    else:
        columns = torch.arange(contrast.shape[0], device=anchors.device)
        found = api.statistics(
            anchors, contrast, scale, row_ids=own, col_ids=columns, pairs="unequal_ids", backend=backend
        )
    assert found.row_lse is not None
    return torch.where(valid, found.row_lse - positive, 0), valid
