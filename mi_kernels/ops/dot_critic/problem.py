"""The arguments of the dot critic's operators as named tuples. The fields have the order of the operators' schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.arguments import SymInt
from ..common.shapes import grouped


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[:, rows]


class Problem(NamedTuple):
    """S[g, i, j] = scale[g] <x[g, i], y[g, j]> + row_bias[g, i] + col_bias[g, j], and the pairs that are included.

    x [G, B, D] and y [G, N, D] may have the caller's leading dimensions, [*, B, D], until `flat`; the other fields are
    flat: scale [G], row_bias [G, B], col_bias [G, N], row_ids [G, B] and col_ids [G, N] int64.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    pairs: int
    positive_shift: SymInt

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs that have gradients, in the order of schema.GRADIENTS."""
        return self[:5]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:7]


class Slopes(NamedTuple):
    """The terms of dS (schema.py). If the slope of an LSE is given, the LSE must be given too."""

    row_lse: Tensor | None = None
    col_lse: Tensor | None = None
    g_row: Tensor | None = None
    g_col: Tensor | None = None
    g_soft: Tensor | None = None
    g_pos: Tensor | None = None
    soft_signed: bool = False

    def of_rows(self, rows: slice) -> Slopes:
        """The terms of a block of rows."""
        row_lse, col_lse, g_row, g_col, g_soft, g_pos, soft_signed = self
        row_lse, g_row, g_soft, g_pos = (rows_of(t, rows) for t in (row_lse, g_row, g_soft, g_pos))
        return Slopes(row_lse, col_lse, g_row, g_col, g_soft, g_pos, soft_signed)


class Weights(NamedTuple):
    """The weights of a loss: w_row sum row_lse + w_col sum col_lse + w_soft sum softplus - w_pos sum of positive
    scores."""

    row: float = 0.0
    col: float = 0.0
    soft: float = 0.0
    pos: float = 0.0
    soft_signed: bool = False


class LossSettings(NamedTuple):
    weights: Weights
    normalize: bool = False
    memory_budget: int = 0
    backend: str = ""
    tiles: torch.dtype | None = None


class RowSettings(NamedTuple):
    symmetric: bool = False
    normalize: bool = False
    backend: str = ""


def flat(problem: Problem, tiles: torch.dtype | None = None) -> Problem:
    """x and y as [G, ., D], contiguous, and in the dtype `tiles` if one is given.

    Done inside autograd's functions, where nothing is recorded.
    """
    x, y = grouped(problem.x), grouped(problem.y)
    if tiles is not None and tiles != x.dtype:
        x, y = x.to(tiles), y.to(tiles)
    rest: tuple[Any, ...] = problem[2:]
    return Problem(x, y, *rest)
