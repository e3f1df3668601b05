"""Positive and negative pairs: from labels or from lists, and the scores of listed pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# anchors of the positive pairs, their positives, anchors of the negative pairs, their negatives
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]

_CHUNK_BYTES = 4 << 20


def positive_pairs(row_class: Tensor, col_class: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """All (row, column) pairs of equal class, except each row's own column, sorted by row: two index vectors.

    Classes are numbered from 0. Columns of a class are contiguous after sorting, so no B x N mask is needed. O(B + N +
    pairs).
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
    """Lists all pairs, for losses and reducers that need indices. O(B N) memory."""
    same = labels[:, None] == ref_labels[None]
    anchors, negatives = torch.where(~same)
    if own is not None:
        same[torch.arange(labels.shape[0], device=labels.device), own] = False
    rows, columns = torch.where(same)
    return rows, columns, anchors, negatives


def as_pairs(indices: tuple[Tensor, ...]) -> Pairs:
    """Converts triplets (anchor, positive, negative) to pairs; pairs are returned unchanged."""
    if len(indices) == 3:
        anchor, positive, negative = indices
        return anchor, positive, anchor, negative
    if len(indices) == 4:
        return indices[0], indices[1], indices[2], indices[3]
    raise ValueError(f"indices_tuple must hold 3 (triplets) or 4 (pairs) index vectors, got {len(indices)}")


def joined(found: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Concatenates two lists in the form of the first: pairs, or triplets of all positives and negatives of an
    anchor."""
    if len(found) == 4:
        given = as_pairs(given)
    elif len(given) == 4:
        positive, negative = torch.where(given[0][:, None] == given[2])
        given = given[0][positive], given[1][positive], given[3][negative]
    return tuple(torch.cat([a, b.to(a)]) for a, b in zip(found, given, strict=True))


def candidates_at(indices: tuple[Tensor, ...], places: Tensor) -> tuple[Tensor, ...]:
    """Renumbers the positives and negatives of pairs or triplets: candidate k becomes places[k]."""
    candidates = (1, 2) if len(indices) == 3 else (1, 3)
    return tuple(places[t.to(places.device)] if i in candidates else t for i, t in enumerate(indices))


def without(indices: tuple[Tensor, ...], own: Tensor) -> tuple[Tensor, ...]:
    """Pairs or triplets whose positive is not the anchor's own column."""
    keep = own[indices[0]] != indices[1]
    kept = 3 if len(indices) == 3 else 2
    return (*(t[keep] for t in indices[:kept]), *indices[kept:])


class _PairScores(torch.autograd.Function):
    """<x_i, y_j> of listed pairs, in chunks: gathering the rows of all pairs would take pairs x features numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, i, j)
        found = [(x[a] * y[b]).sum(1) for a, b in _chunks(x, i, j)]
        return torch.cat(found) if found else x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, y, i, j = ctx.saved_tensors
        if torch.is_grad_enabled():
            slope = g[:, None]
            dx = torch.zeros_like(x).index_add(0, i, slope * y[j])
            dy = torch.zeros_like(y).index_add(0, j, slope * x[i])
            return dx, dy, None, None
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        step = _rows_of_chunk(x)
        for (a, b), slope in zip(_chunks(x, i, j), g[:, None].split(step), strict=True):
            dx.index_add_(0, a, slope * y[b])
            dy.index_add_(0, b, slope * x[a])
        return dx, dy, None, None


def _rows_of_chunk(x: Tensor) -> int:
    return max(1, _CHUNK_BYTES // (x.element_size() * max(1, x.shape[1])))


def _chunks(x: Tensor, i: Tensor, j: Tensor) -> list[tuple[Tensor, Tensor]]:
    step = _rows_of_chunk(x)
    return list(zip(i.split(step), j.split(step), strict=True)) if i.numel() else []


def pair_scores(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """<x_i, y_j> of listed pairs [P], twice differentiable. O(P) memory plus a chunk of 4 MiB."""
    return _PairScores.apply(x, y, i, j)
