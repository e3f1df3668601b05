"""Operations on rows of features: conversion to the accumulation type, normalisation, and sums by class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulate_dtype


def sums_of(number: int, index: Tensor, rows: Tensor) -> Tensor:
    """Sums the rows [n, *] of each index [n] in a fixed order: [number, *]. On GPUs index_add uses atomics, whose order
    varies, and index_put sorts."""
    zeros = rows.new_zeros(number, *rows.shape[1:])
    if rows.is_cpu:
        return zeros.index_add(0, index, rows)
    return zeros.index_put((index,), rows, accumulate=True)


def rows_at(t: Tensor, index: Tensor) -> Tensor:
    """Rows index [n] of t, possibly repeated. The gradient is summed in a fixed order, as in `sums_of`."""
    return t.index_select(0, index) if t.is_cpu else t[index]


def widened(t: Tensor) -> Tensor:
    """Converts t to the accumulation type. A loss converts its features once, so that the gradients of its terms are
    added before they are rounded."""
    return t.to(accumulate_dtype(t.dtype))


def null_rows(t: Tensor) -> Tensor:
    """A mask of the rows that are all zero, [*, 1]."""
    return (t == 0).all(-1, keepdim=True)


def unit_rows(t: Tensor) -> Tensor:
    """Normalises rows. The result is in the accumulation type, with values that t's dtype represents exactly.

    The norm is computed in fp32: in fp16 the eps of F.normalize is 0, and a zero row would become NaN. Zero rows stay
    zero; in 16 bits they get no gradient, because that of F.normalize (1e12 times the incoming gradient) would be
    infinite. Rounding passes gradients straight through.
    """
    wide = widened(t)
    if wide.dtype == t.dtype:
        return F.normalize(wide, dim=-1)
    unit = F.normalize(wide.masked_fill(null_rows(t.detach()), 0), dim=-1)
    return unit + (unit.to(t.dtype).to(unit.dtype) - unit).detach()
