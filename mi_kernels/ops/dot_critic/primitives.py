"""Shared by the plain torch implementations of the dot-product critic: scores, masks and dS of a block of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype, lse_dtype, rounded_lse
from ..common.precision import outside_autocast
from .problem import Slopes
from .schema import COL_LSE, OFF_DIAGONAL, ROW_LSE, SIGNED, SOFTPLUS, UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE


@outside_autocast
def scores(x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor | None, col_bias: Tensor | None) -> Tensor:
    """scale <x_i, y_j> + row_bias_i + col_bias_j, [G, B, N], accumulated in fp32 (fp64 for fp64)."""
    wide = accumulate_dtype(x.dtype)
    s = torch.matmul(x.to(wide), y.to(wide).mT) * scale.to(wide)[:, None, None]
    if row_bias is not None:
        s = s + row_bias.to(wide)[:, :, None]
    if col_bias is not None:
        s = s + col_bias.to(wide)[:, None, :]
    return s


def positives(first: int, rows: int, columns: int, shift: int, device: torch.device) -> Tensor:
    """Column of the positive pair of rows first .. first + rows - 1."""
    return (torch.arange(first, first + rows, device=device) + shift) % columns


def allowed(
    rows: int,
    columns: int,
    first: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    pairs: int,
    shift: int,
    device: torch.device,
) -> Tensor | None:
    """A mask of the included pairs, [G or 1, rows, columns]; None if all are included."""
    if pairs == OFF_DIAGONAL:
        i = torch.arange(first, first + rows, device=device)
        return (i[:, None] != torch.arange(columns, device=device))[None]
    if pairs in (UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE):
        assert row_ids is not None and col_ids is not None
        mask = row_ids[:, :, None] != col_ids[:, None, :]
        if pairs == UNEQUAL_IDS_OR_POSITIVE:
            j = positives(first, rows, columns, shift, device)
            mask = mask | (j[:, None] == torch.arange(columns, device=device))
        return mask
    return None


def flip_positives(s: Tensor, first: int, shift: int) -> Tensor:
    """-S on the positive pairs, S elsewhere."""
    j = positives(first, s.shape[1], s.shape[2], shift, s.device)
    sign = torch.ones(s.shape[1:], dtype=s.dtype, device=s.device)
    sign[torch.arange(s.shape[1], device=s.device), j] = -1
    return s * sign


def softplus_rows(s: Tensor, mask: Tensor | None, first: int, shift: int, stats: int) -> Tensor:
    """sum_j softplus(S_ij) over included pairs; with SIGNED the positive pair has the opposite sign."""
    signed = flip_positives(s, first, shift) if stats & SIGNED else s
    soft = torch.logaddexp(signed, torch.zeros((), dtype=s.dtype, device=s.device))
    return (soft if mask is None else soft.masked_fill(~mask, 0)).sum(-1)


def clipped(s: Tensor, clip: float) -> Tensor:
    """Scores clamped to [-clip, clip]; -inf, which marks an excluded pair, is unchanged."""
    return s if clip == math.inf else torch.where(s == -torch.inf, s, s.clamp(-clip, clip))


def _lse(s: Tensor, dim: int) -> Tensor:
    """The log-sum-exp in fp64 without fp64 copies of the scores: the largest score plus what the others add to it."""
    top = s.detach().amax(dim, keepdim=True)
    top = top.masked_fill(~top.isfinite(), 0)
    wide = lse_dtype(s.device)
    return top.squeeze(dim).to(wide) + (s - top).logsumexp(dim).to(wide)


def statistics(
    s: Tensor, mask: Tensor | None, first: int, shift: int, stats: int, clip: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column LSE of the clipped scores in fp64, and softplus sums of the scores; unrequested ones are empty.
    Differentiable."""
    soft = softplus_rows(s, mask, first, shift, stats) if stats & SOFTPLUS else s.new_empty(0)
    s = clipped(s, clip)
    masked = s if mask is None else s.masked_fill(~mask, -torch.inf)
    # a new empty tensor for each, because outputs of an operator must not alias
    wide = lse_dtype(s.device)
    row = _lse(masked, -1) if stats & ROW_LSE else s.new_empty(0, dtype=wide)
    col = _lse(masked, -2) if stats & COL_LSE else s.new_empty(0, dtype=wide)
    return row, col, soft


def _softmax(s: Tensor, lse: Tensor, g: Tensor, dim: int) -> Tensor:
    """g exp(s - lse), with lse and g along the other dimension than `dim`."""
    lse, factor = rounded_lse(lse, s.dtype)
    g = g if factor is None else g * factor
    return g.unsqueeze(dim) * (s - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(dim)).exp()


def dscores(s: Tensor, mask: Tensor | None, first: int, shift: int, slopes: Slopes) -> Tensor:
    """dL/dS from the statistics and their incoming gradients (see schema.py); `slopes` are those of these rows."""
    row_lse, col_lse, g_row, g_col, g_soft, g_pos, soft_signed = slopes
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    d = torch.zeros_like(s)
    if g_row is not None and row_lse is not None:
        d += _softmax(s, row_lse, g_row, -1)
    if g_col is not None and col_lse is not None:
        d += _softmax(s, col_lse, g_col, -2)
    if g_soft is not None:
        slope = flip_positives(s, first, shift).sigmoid() if soft_signed else s.sigmoid()
        d += g_soft[:, :, None] * (flip_positives(slope, first, shift) if soft_signed else slope)
    if g_pos is not None:
        j = positives(first, s.shape[1], s.shape[2], shift, s.device)
        d[:, torch.arange(s.shape[1], device=s.device), j] += g_pos
    return d
