"""Definition, statistics and operator schemas of `mlp_critic`. Imports only torch.

The score of a pair is a multilayer perceptron on the concatenation of both sides,

    S[i, j] = out(w . act(W_k ... act(W_2 act(u_i + v_j) + b_2) ... + b_k) + b)

whose first layer is separable: `u = x W_x^T`, `v = y W_y^T + b_1` with `W_1 = [W_x, W_y]`; `out` is the identity or
softplus. Operators start from u and v, which cost O(B D H), and reduce S to the statistics

    positive [G, B]          S[i, i]; empty ([G, 0]) when S is not square
    row_lse [G, B]           log sum_j exp S[i, j]
    col_lse [G, N]           log sum_i exp S[i, j]
    row_sum [G, B]           sum_j S[i, j]
    row_softplus [G, B]      sum_j softplus S[i, j]
    clipped_row_lse [G, B]   log sum_j exp clamp(S[i, j], -clip, clip); a value without a gradient

over all pairs or over pairs with i != j (`positive` is the diagonal in both cases). Without any pair (B = 1 and i != j)
the log-sum-exps are -inf, the sums are 0, and their gradients are 0.

Shapes: u [G, B, H_1], v [G, N, H_1]; `weights[l]` [1 or G, H_{l+2}, H_{l+1}], the last [1 or G, 1, H_k]; `biases[l]`
[1 or G, H_{l+2}]. Layers run in the dtype of the weights. Beside 16-bit weights u and v are fp32, so that u + v is
rounded once. Gradients are summed in fp32 at least and come back in the dtype of their input. Statistics are fp32 for
16- and 32-bit inputs and fp64 for fp64. Bits of `stats` ask for the four log-sums and softplus sums; what is not asked
for comes back empty ([G, 0]).

`clip` is one fp64 number in a CPU tensor: a float would be a constant of a compiled graph.

With `keep`, a forward returns for the backward the scores before `out` and one bit for each unit of the second hidden
layer. The CPU keeps them in tiles of R x C pairs: `kept_scores` [G, row tiles, column tiles, R C] and `kept_masks` [G,
row tiles, column tiles, ceil(H_2 / 32), R C] int32; Triton and CUDA by rows: `kept_scores` [G, B, N] and `kept_masks`
[G, B, ceil(H_2 / 32), N] int32. Without `keep` both are empty and the backward runs the forward again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import schema, split
from ..common.dtypes import accumulate_dtype
from .problem import Critic, Kept, LogSums, Request, Resources, Score, Slopes

# What csrc/mlp_critic/schema.h states too; tests/ops/common/test_schemas.py compares the two.
ROW_LSE, COL_LSE, ROW_SOFTPLUS, CLIPPED_ROW_LSE = 1, 2, 4, 8
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "elu", "gelu", "silu")
OUTPUTS = ("identity", "softplus")
TILE_PAIRS, COLUMN_STEP = 64, 16

PIECEWISE_LINEAR = ("relu", "leaky_relu")  # activations whose slope one bit determines
BITS = {"row_lse": ROW_LSE, "col_lse": COL_LSE, "row_softplus": ROW_SOFTPLUS, "clipped_row_lse": CLIPPED_ROW_LSE}


library = torch.library.Library("mi_kernels", "FRAGMENT")
_critic = schema(Critic, Score)
library.define(
    f"mlp_critic_forward({_critic}, {schema(Request, Resources)}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"mlp_critic_backward({_critic}, {schema(LogSums)}, {schema(Slopes, prefix='grad_')}, "
    f"{schema(Kept, prefix='kept_')}, bool need_parameters, {schema(Resources)}) -> Tensor[]"
)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def tiling(rows: int, columns: int) -> tuple[int, int, int, int]:
    """(R, C, row tiles, column tiles) of the CPU kernels: tiles of at most TILE_PAIRS pairs."""
    column_tiles = _ceil(columns, TILE_PAIRS)
    c = COLUMN_STEP * _ceil(_ceil(columns, column_tiles), COLUMN_STEP)
    r = TILE_PAIRS // c
    return r, c, _ceil(rows, r), column_tiles


def kept_shapes(
    groups: int, rows: int, columns: int, width: int, backend: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `kept_scores` and `kept_masks` with `width` units in the second hidden layer."""
    words = _ceil(width, 32)
    if backend in ("triton", "cuda"):
        return (groups, rows, columns), (groups, rows, words, columns)
    r, c, row_tiles, column_tiles = tiling(rows, columns)
    lead = (groups, row_tiles, column_tiles)
    return (*lead, r * c), (*lead, words, r * c)


@torch.library.register_fake("mi_kernels::mlp_critic_forward", lib=library)
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    critic, _, request, resources = split(arguments, Critic, Score, Request, Resources)
    u, v, stats = critic.u, critic.v, request.stats
    groups, rows, columns = u.shape[0], u.shape[1], v.shape[1]
    dtype = accumulate_dtype(u.dtype)
    lengths = (
        rows if rows == columns else 0,
        rows if stats & ROW_LSE else 0,
        columns if stats & COL_LSE else 0,
        rows,
        rows if stats & ROW_SOFTPLUS else 0,
        rows if stats & CLIPPED_ROW_LSE else 0,
    )
    shapes: tuple[tuple[int, ...], ...] = ((0,), (0,))
    if request.keep:
        shapes = kept_shapes(groups, rows, columns, critic.weights[0].shape[1], resources.backend)
    return (
        *(u.new_empty((groups, n), dtype=dtype) for n in lengths),
        u.new_empty(shapes[0], dtype=dtype),
        u.new_empty(shapes[1], dtype=torch.int32),
    )


@torch.library.register_fake("mi_kernels::mlp_critic_backward", lib=library)
def _backward_fake(*arguments: Any) -> list[Tensor]:
    critic, need_parameters = split(arguments, Critic)[0], arguments[-1 - len(Resources._fields)]
    return [t.new_empty(t.shape) for t in (critic.tensors if need_parameters else critic.tensors[:2])]
