"""Features before they meet: widened once, brought to unit length, added up by class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulate_dtype


def sums_of(number: int, index: Tensor, rows: Tensor) -> Tensor:
    """[number, *]: the sum of the rows [n, *] of each index [n], in a fixed order. On GPUs index_add adds by atomics,
    index_put sorts."""
    zeros = rows.new_zeros(number, *rows.shape[1:])
    if rows.is_cpu:
        return zeros.index_add(0, index, rows)
    return zeros.index_put((index,), rows, accumulate=True)


def rows_at(t: Tensor, index: Tensor) -> Tensor:
    """Rows index [n] of t, repeated or not; the gradient is summed in a fixed order, as `sums_of` does."""
    return t.index_select(0, index) if t.is_cpu else t[index]


def widened(t: Tensor) -> Tensor:
    """In the accumulation type. All paths to a loss start from it: their gradients cancel before they are rounded."""
    return t.to(accumulate_dtype(t.dtype))


def null_rows(t: Tensor) -> Tensor:
    """Which rows are all zero, [*, 1]."""
    return (t == 0).all(-1, keepdim=True)


def unit_rows(t: Tensor) -> Tensor:
    """Rows of unit length in the accumulation type, of values that t's dtype holds exactly; a zero row stays zero.

    The norm is taken in fp32: in fp16 the eps of F.normalize is 0 and a zero row becomes NaN. A zero row of 16 bits
    gets no gradient, since F.normalize's, 1e12 times the slope, would be infinite there. Rounding passes its gradient
    straight through.
    """
    wide = widened(t)
    if wide.dtype == t.dtype:
        return F.normalize(wide, dim=-1)
    unit = F.normalize(wide.masked_fill(null_rows(t.detach()), 0), dim=-1)
    return unit + (unit.to(t.dtype).to(unit.dtype) - unit).detach()
