"""Features before they meet: widened once, and brought to unit length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulate_dtype


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
