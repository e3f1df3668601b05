"""Operators of the dot critic: schemas, what they mean, and their shape functions. Imports torch alone.

    S[g, i, j] = scale[g] <x[g, i], y[g, j]> + row_bias[g, i] + col_bias[g, j]

x [G, B, D], y [G, N, D], scale [G], row_bias [G, B], col_bias [G, N], row_ids [G, B] and col_ids [G, N] int64.
`pairs` says which (i, j) take part; `positive_shift` s >= 0 pairs row i with column (i + s) mod N, -1 pairs none.

dot_critic_stats -> row_lse [G, B], col_lse [G, N], softplus row sums [G, B]; bits of `stats` ask for each. The LSEs
    are those of scores clamped to [-clip, clip] (inf: as they are); a score of -inf takes no part, clamped or not.
dot_critic_grad  -> gradients of x, y, scale, row_bias, col_bias under
    dS_ij = g_row_i exp(S_ij - row_lse_i) + g_col_j exp(S_ij - col_lse_j) + g_soft_i sigmoid(S_ij) over allowed pairs,
            + g_pos_i on the positive pair.
dot_critic_loss  -> [G] losses
    w_row sum_i row_lse_i + w_col sum_j col_lse_j + w_soft sum softplus - w_pos sum_i S_i,pos(i),
    with those gradients, in one call: one-sided losses cost 3N = 6 B N D FLOP, nothing is computed twice.
`normalize` brings rows of x and y to unit length first; the gradients are those of the rows given.
Bits of `needs` say which gradients are wanted; the others come back empty. `backend` "" is the automatic choice.
"""

from __future__ import annotations

import torch

from ..common.dtypes import accumulate_dtype

ALL, OFF_DIAGONAL, UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE = 0, 1, 2, 3
ROW_LSE, COL_LSE, SOFTPLUS, SIGNED = 1, 2, 4, 8
NEED_X, NEED_Y, NEED_ROW_BIAS, NEED_COL_BIAS, NEED_SCALE = 1, 2, 4, 8, 16
GRADIENTS = (NEED_X, NEED_Y, NEED_SCALE, NEED_ROW_BIAS, NEED_COL_BIAS)  # in the order in which they come back

library = torch.library.Library("mi_kernels", "FRAGMENT")
_problem = (
    "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? row_ids, Tensor? col_ids, "
    "int pairs, SymInt positive_shift"
)
library.define(f"dot_critic_stats({_problem}, int stats, float clip, str backend) -> (Tensor, Tensor, Tensor)")
library.define(
    f"dot_critic_grad({_problem}, Tensor? row_lse, Tensor? col_lse, Tensor? g_row, Tensor? g_col, Tensor? g_soft, "
    "Tensor? g_pos, bool soft_signed, int needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"dot_critic_loss({_problem}, float w_row, float w_col, float w_soft, float w_pos, bool soft_signed, "
    "bool normalize, int needs, int memory_budget, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)



@torch.library.register_fake("mi_kernels::dot_critic_stats", lib=library)
def _(x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift, stats, clip, backend):
    new = lambda wanted, n: x.new_empty((x.shape[0], n) if wanted else (0,), dtype=accumulate_dtype(x.dtype))  # noqa: E731
    return new(stats & ROW_LSE, x.shape[1]), new(stats & COL_LSE, y.shape[1]), new(stats & SOFTPLUS, x.shape[1])


def _empty_gradients(x, y, needs):
    wide = accumulate_dtype(x.dtype)
    groups, rows, columns = x.shape[0], x.shape[1], y.shape[1]
    return (
        x.new_empty(x.shape if needs & NEED_X else (0,)),
        x.new_empty(y.shape if needs & NEED_Y else (0,)),
        x.new_empty((groups,) if needs & NEED_SCALE else (0,), dtype=wide),
        x.new_empty((groups, rows) if needs & NEED_ROW_BIAS else (0,), dtype=wide),
        x.new_empty((groups, columns) if needs & NEED_COL_BIAS else (0,), dtype=wide),
    )


@torch.library.register_fake("mi_kernels::dot_critic_grad", lib=library)
def _(
    x,
    y,
    scale,
    row_bias,
    col_bias,
    row_ids,
    col_ids,
    pairs,
    positive_shift,
    row_lse,
    col_lse,
    g_row,
    g_col,
    g_soft,
    g_pos,
    soft_signed,
    needs,
    backend,
):
    return _empty_gradients(x, y, needs)


@torch.library.register_fake("mi_kernels::dot_critic_loss", lib=library)
def _(
    x,
    y,
    scale,
    row_bias,
    col_bias,
    row_ids,
    col_ids,
    pairs,
    positive_shift,
    w_row,
    w_col,
    w_soft,
    w_pos,
    soft_signed,
    normalize,
    needs,
    memory_budget,
    backend,
):
    return (x.new_empty((x.shape[0],), dtype=accumulate_dtype(x.dtype)), *_empty_gradients(x, y, needs))
