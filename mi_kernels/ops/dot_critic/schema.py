"""Operators of the dot-product critic: schemas, definitions and shape functions. Imports only torch.

    S[g, i, j] = scale[g] <x[g, i], y[g, j]> + row_bias[g, i] + col_bias[g, j]

x [G, B, D], y [G, N, D], scale [G], row_bias [G, B], col_bias [G, N], row_ids [G, B] and col_ids [G, N] int64.
`pairs` selects the included (i, j). `positive_shift` s >= 0 means that the positive of row i is column (i + s) mod N;
-1 means no positives.

dot_critic_stats -> row_lse [G, B], col_lse [G, N], softplus row sums [G, B]; bits of `stats` select them. The LSEs are
in fp64 (dtypes.py says why), the sums in the accumulation type. The LSEs are those of
    scores clamped to [-clip, clip] (inf: not clamped). A score of -inf is excluded, clamped or not.
dot_critic_grad  -> gradients of x, y, scale, row_bias, col_bias, all in the accumulation type, for
    dS_ij = g_row_i exp(S_ij - row_lse_i) + g_col_j exp(S_ij - col_lse_j) + g_soft_i sigmoid(S_ij) over allowed pairs,
            + g_pos_i on the positive pair.
dot_critic_loss  -> [G] losses
    w_row sum_i row_lse_i + w_col sum_j col_lse_j + w_soft sum softplus - w_pos sum_i S_i,pos(i),
    with their gradients, in one call. One-sided losses cost 3N = 6 B N D FLOP, because nothing is computed twice.
`normalize` first scales rows of x and y to unit length; gradients are those of the given rows.
Bits of `needs` select the gradients to compute; the others are empty. `backend` "" is the automatic choice.
csrc/dot_critic/schema.h repeats the bits for C++; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import schema, split
from ..common.dtypes import accumulate_dtype, lse_dtype
from .problem import Problem, Slopes, Weights

ALL, OFF_DIAGONAL, UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE = 0, 1, 2, 3
ROW_LSE, COL_LSE, SOFTPLUS, SIGNED = 1, 2, 4, 16
NEED_X, NEED_Y, NEED_ROW_BIAS, NEED_COL_BIAS, NEED_SCALE = 1, 2, 4, 8, 16
GRADIENTS = (NEED_X, NEED_Y, NEED_SCALE, NEED_ROW_BIAS, NEED_COL_BIAS)  # in the order that operators return
ALL_GRADIENTS = NEED_X | NEED_Y | NEED_SCALE | NEED_ROW_BIAS | NEED_COL_BIAS

library = torch.library.Library("mi_kernels", "FRAGMENT")
_problem = schema(Problem)
library.define(f"dot_critic_stats({_problem}, int stats, float clip, str backend) -> (Tensor, Tensor, Tensor)")
library.define(
    f"dot_critic_grad({_problem}, {schema(Slopes)}, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"dot_critic_loss({_problem}, {schema(Weights)}, bool normalize, int needs, int memory_budget, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mi_kernels::dot_critic_stats", lib=library)
def _stats_fake(*arguments: Any) -> Any:
    (x, y, *_), stats, *_ = split(arguments, Problem)
    new = lambda wanted, n, dtype: x.new_empty((x.shape[0], n) if wanted else (0,), dtype=dtype)  # noqa: E731
    wide = lse_dtype(x.device)
    row, col = new(stats & ROW_LSE, x.shape[1], wide), new(stats & COL_LSE, y.shape[1], wide)
    return row, col, new(stats & SOFTPLUS, x.shape[1], accumulate_dtype(x.dtype))


def _empty_gradients(x: Tensor, y: Tensor, needs: int) -> Any:
    groups, rows, columns = x.shape[0], x.shape[1], y.shape[1]
    shapes = (x.shape, y.shape, (groups,), (groups, rows), (groups, columns))
    dtype = accumulate_dtype(x.dtype)
    return tuple(
        x.new_empty(shape if needs & bit else (0,), dtype=dtype) for shape, bit in zip(shapes, GRADIENTS, strict=True)
    )


@torch.library.register_fake("mi_kernels::dot_critic_grad", lib=library)
def _grad_fake(*arguments: Any) -> Any:
    return _empty_gradients(arguments[0], arguments[1], arguments[-2])


@torch.library.register_fake("mi_kernels::dot_critic_loss", lib=library)
def _loss_fake(*arguments: Any) -> Any:
    x, y, needs = arguments[0], arguments[1], arguments[-3]
    return x.new_empty((x.shape[0],), dtype=accumulate_dtype(x.dtype)), *_empty_gradients(x, y, needs)
