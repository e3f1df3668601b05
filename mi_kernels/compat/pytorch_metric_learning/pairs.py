"""Positive pairs from labels, and log-sums of listed pairs."""

from __future__ import annotations

import torch
from torch import Tensor

# anchors of the positive pairs, their positives, anchors of the negative pairs, their negatives
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


def positive_pairs(row_class: Tensor, col_class: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every (row, column) of one class but a row's own column, by rows: two index vectors. O(B + N + pairs).

    Classes count from 0. Columns of a class are consecutive once sorted, so no B x N mask is needed.
    """
    order = torch.argsort(col_class, stable=True)
    sizes = torch.bincount(col_class, minlength=int(row_class.max()) + 1)
    first = sizes.cumsum(0) - sizes
    counts = sizes[row_class]
    row = torch.repeat_interleave(torch.arange(row_class.shape[0], device=row_class.device), counts)
    start = (counts.cumsum(0) - counts)[row]
    column = order[first[row_class[row]] + torch.arange(row.shape[0], device=row.device) - start]
    if own is None:
        return row, column
    keep = own[row] != column
    return row[keep], column[keep]


def all_pairs(labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> Pairs:
    """Every pair, listed: O(B N) memory, for losses and reducers that want indices."""
    same = labels[:, None] == ref_labels[None]
    anchors, negatives = torch.where(~same)
    if own is not None:
        same[torch.arange(labels.shape[0], device=labels.device), own] = False
    rows, columns = torch.where(same)
    return rows, columns, anchors, negatives


def as_pairs(indices: tuple[Tensor, ...]) -> Pairs:
    """Triplets (anchor, positive, negative) or pairs, as pairs."""
    if len(indices) == 3:
        anchor, positive, negative = indices
        return anchor, positive, anchor, negative
    if len(indices) == 4:
        return indices[0], indices[1], indices[2], indices[3]
    raise ValueError(f"indices_tuple must hold 3 (triplets) or 4 (pairs) index vectors, got {len(indices)}")


def listed_log_sum(scores: Tensor, rows: Tensor, number: int) -> Tensor:
    """log of the sum of exp scores [P] over those of one row, [number]; -inf where a row has none."""
    top = scores.new_full((number,), -torch.inf).scatter_reduce(0, rows, scores.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0)
    total = scores.new_zeros(number).index_add(0, rows, (scores - top[rows]).exp())
    none = total == 0
    return torch.where(none, -torch.inf, torch.where(none, 1, total).log() + top)
