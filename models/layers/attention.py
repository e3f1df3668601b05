"""What one sequence may see of another, and the attention of several such pairs in one call.

MulT's mask lets query i see the keys j <= i + c, c = |Tk - Tq|. With lengths, c belongs to the item, not to the padded
batch, or an item's result would depend on the longest of its batch. The operator takes one offset for a batch, so the
keys of item b are moved down by C - c_b, C the largest offset: j + C - c_b <= i + C is the same condition. An extra
feature gives the rows that this leaves free a score far below any other, so that their weight is exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mi_kernels as mk
from models.batch import Inputs

# Their product, -2^21, dwarfs any score; both are exact in every dtype.
QUERY_MARK, FREE_ROW = 2.0**7, -(2.0**14)


# Queries [B, heads, Tq, E], keys and values [B, heads, Tk, E].
Projected = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Visible:
    """Lengths [B] or None (no padding) of target and source; the causal offset of the batch or None (no mask);
    ``shift`` [B], the steps by which each item's keys move down to have that offset, and the steps that they then take.
    """

    target_lengths: Tensor | None = None
    source_lengths: Tensor | None = None
    offset: int | None = None
    shift: Tensor | None = None
    steps: int = 0

    @classmethod
    def between(cls, target: Inputs, source: Inputs, causal: bool) -> Visible:
        """MulT's view of a source: everything within its length, up to j = i + |Lk - Lq| where ``causal``.

        With a source and lengths a causal view reads them, so an accelerator is waited for.
        """
        if not causal:
            return cls(target.lengths, source.lengths)
        if target is source:
            return cls(target.lengths, target.lengths, 0)
        if target.lengths is None and source.lengths is None:
            return cls(offset=abs(target.values.shape[1] - source.values.shape[1]))
        own, other = target.steps(), source.steps()
        offsets = (own - other).abs()
        # A mask that hides nothing needs no alignment.
        needed = torch.minimum(offsets, other - 1)
        common = needed.max()
        shift = torch.where(offsets < other - 1, common - offsets, 0)
        largest, shifted, steps = torch.stack([common, shift.max(), (other + shift).max()]).tolist()
        if not shifted:
            return cls(target.lengths, source.lengths, largest)
        return cls(target.lengths, other + shift, largest, shift, steps)


def attend(projected: Sequence[Projected], visible: Sequence[Visible], rates: Sequence[float]) -> list[Tensor]:
    """Attention of every (queries, keys, values) [B, heads, T, E], each with its view and its dropout of weights."""
    scales = [1 / math.sqrt(queries.shape[3]) for queries, *_ in projected]
    aligned = [_aligned(*parts, view) for parts, view in zip(projected, visible, strict=True)]
    queries, keys, values = (list(parts) for parts in zip(*aligned, strict=True))
    return mk.cross_attention_grouped(
        queries,
        keys,
        values,
        query_lengths=[view.target_lengths for view in visible],
        key_lengths=[view.source_lengths for view in visible],
        causal_offset=[view.offset for view in visible],
        dropout_p=list(rates),
        scale=scales,
    )


def _aligned(queries: Tensor, keys: Tensor, values: Tensor, view: Visible) -> Projected:
    if view.shift is None:
        return queries, keys, values
    index = torch.arange(view.steps, device=keys.device) - view.shift[:, None]  # [B, steps]
    rows = index.clamp(0, keys.shape[2] - 1)[:, None, :, None]
    keys, values = (t.gather(2, rows.expand(-1, t.shape[1], -1, t.shape[3])) for t in (keys, values))
    free = torch.where(index < 0, FREE_ROW, 0.0).to(keys.dtype)[:, None, :, None]
    return _widened(queries, QUERY_MARK), torch.cat([keys, free.expand(-1, keys.shape[1], -1, -1)], 3), values


def _widened(t: Tensor, value: float) -> Tensor:
    return torch.cat([t, t.new_full((*t.shape[:3], 1), value)], 3)
