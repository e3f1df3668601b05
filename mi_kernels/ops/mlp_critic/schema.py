"""Names, statistics and operator schemas of `mlp_critic`.

The score of a pair is a multilayer perceptron on the concatenation of both sides,

    S[i, j] = w . act(W_k ... act(W_2 act(u_i + v_j) + b_2) ... + b_k) + b

whose first layer is separable: `u = x W_x^T`, `v = y W_y^T + b_1` with `W_1 = [W_x, W_y]`. Operators start
from u and v, which cost O(B D H), and reduce S to the statistics

    positive [G, B]   S[i, i]; empty ([G, 0]) when S is not square
    row_lse  [G, B]   log sum_j exp S[i, j]
    col_lse  [G, N]   log sum_i exp S[i, j]
    row_sum  [G, B]   sum_j S[i, j]

over all pairs or over pairs with i != j (`positive` is the diagonal either way). Over no pair at all (B = 1
off the diagonal) the two log-sums are -inf and the sum is 0; their gradients are 0.

Shapes: u [G, B, H_1], v [G, N, H_1]; `weights[l]` [1 or G, H_{l+2}, H_{l+1}], the last [1 or G, 1, H_k];
`biases[l]` [1 or G, H_{l+2}]. Statistics are fp32 for 16- and 32-bit inputs and fp64 for fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("positive", "row_lse", "col_lse", "row_sum")
PAIRS = ("all", "off_diagonal")

FORWARD = "mi_kernels::mlp_critic_forward"
BACKWARD = "mi_kernels::mlp_critic_backward"


class Statistics(NamedTuple):
    """What a bound reads of a score matrix; a field is None when it was not asked for."""

    positive: Tensor | None = None
    row_lse: Tensor | None = None
    col_lse: Tensor | None = None
    row_sum: Tensor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of `dtype` are accumulated and statistics returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


torch.library.define(
    FORWARD,
    "(Tensor u, Tensor v, Tensor[] weights, Tensor[] biases, str activation, bool off_diagonal, "
    "bool row_lse, bool col_lse, int memory_budget) "
    "-> (Tensor positive, Tensor row_lse, Tensor col_lse, Tensor row_sum)",
)
torch.library.define(
    BACKWARD,
    "(Tensor u, Tensor v, Tensor[] weights, Tensor[] biases, Tensor row_lse, Tensor col_lse, "
    "Tensor grad_positive, Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_sum, "
    "str activation, bool off_diagonal, bool need_parameters, int memory_budget) -> Tensor[]",
)


@torch.library.register_fake(FORWARD)
def _forward_fake(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    off_diagonal: bool,
    row_lse: bool,
    col_lse: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, rows, columns = u.shape[0], u.shape[1], v.shape[1]
    dtype = accumulator(u.dtype)
    return (
        u.new_empty((groups, rows if rows == columns else 0), dtype=dtype),
        u.new_empty((groups, rows if row_lse else 0), dtype=dtype),
        u.new_empty((groups, columns if col_lse else 0), dtype=dtype),
        u.new_empty((groups, rows), dtype=dtype),
    )


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    row_lse: Tensor,
    col_lse: Tensor,
    grad_positive: Tensor,
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_row_sum: Tensor,
    activation: str,
    off_diagonal: bool,
    need_parameters: bool,
    memory_budget: int,
) -> list[Tensor]:
    parameters = [*weights, *biases] if need_parameters else []
    return [t.new_empty(t.shape) for t in (u, v, *parameters)]
