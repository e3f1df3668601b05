"""A complete loss and its gradients in Triton, with as few launches as the schedule allows.

Launches of the fused schedule: normalisation (1), statistics (1 per side), the sum (2), the weights (2), gradients (3)
and the backward pass of the normalisation (1), if the features fit one block of the backward kernel; wider features use
its stored schedule. triton_stored.py describes the other schedule, and routes.py chooses. Normalised features keep
their dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.triton import as_vector
from . import routes, triton_backward, triton_forward, triton_rows, triton_stored
from .schema import COL_LSE, GRADIENTS, NEED_X, NEED_Y, ROW_LSE, SIGNED, SOFTPLUS
from .triton_common import check


def loss(
    problem: tuple,
    w_row: float,
    w_col: float,
    w_soft: float,
    w_pos: float,
    soft_signed: bool,
    normalize: bool,
    needs: int,
) -> tuple[torch.Tensor, ...]:
    """(loss [G], dx, dy, dscale, drow_bias, dcol_bias) as the operator dot_critic_loss of schema.py has it."""
    x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift = problem
    check(x, y, row_ids, col_ids, pairs, shift, triton_forward.INTERPRETED)
    x, y = x.contiguous(), y.contiguous()
    rows = (x, y) if not normalize else triton_rows.normalize(x, y)
    unit = (*rows, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift)
    if triton_stored.eligible(unit, w_row, w_col, w_soft) and _schedule(x, y) == "stored":
        value, *gradients = triton_stored.loss(unit, w_row, w_soft, w_pos, soft_signed, needs)
    else:
        value, *gradients = _fused(unit, w_row, w_col, w_soft, w_pos, soft_signed, needs)
    if normalize and needs & (NEED_X | NEED_Y):
        given = (g if needs & bit else None for g, bit in zip(gradients, (NEED_X, NEED_Y), strict=False))
        dx, dy = triton_rows.normalize_back(x, y, *given)
        gradients[:2] = [value.new_empty(0) if d is None else d for d in (dx, dy)]
    return value, *gradients


def _schedule(x: torch.Tensor, y: torch.Tensor) -> str:
    return routes.choose(x.dtype, x.shape[1], y.shape[1], x.shape[2], routes.architecture(x.device))


def _fused(
    problem: Any, w_row: float, w_col: float, w_soft: float, w_pos: float, soft_signed: bool, needs: int
) -> tuple[torch.Tensor, ...]:
    x, y, scale, row_bias, col_bias, _, _, _, shift = problem
    wanted = (ROW_LSE if w_row else 0) | (COL_LSE if w_col else 0)
    wanted |= (SOFTPLUS | (SIGNED if soft_signed else 0)) if w_soft else 0
    asked: tuple = (*problem, wanted)
    row, col, soft = triton_forward.stats(*asked)
    stats = (row if w_row else None, col if w_col else None, soft if w_soft else None)
    row_bias, col_bias = as_vector(row_bias, scale.dtype), as_vector(col_bias, scale.dtype)
    value = triton_rows.total(x, y, scale, row_bias, col_bias, shift, stats, (w_row, w_col, w_soft, w_pos))
    if not needs:
        return value, *(value.new_empty(0) for _ in GRADIENTS)
    slopes = (*_slopes(value, x, y, w_row, w_col, w_soft), _positive(value, x, shift, w_pos))
    arguments = (*problem, stats[0], stats[1], *slopes, soft_signed, needs)
    return value, *triton_backward.grad(*arguments)


def _slopes(like: torch.Tensor, x, y, w_row: float, w_col: float, w_soft: float) -> list[Any]:
    """g_row, g_col and g_soft; weights that are equal share what one launch fills."""
    (G, B), N = x.shape[:2], y.shape[1]
    filled: dict[float, torch.Tensor] = {}
    found: list[torch.Tensor | None] = []
    for w, n in ((w_row, B), (w_col, N), (w_soft, B)):
        if w and w not in filled:
            filled[w] = like.new_full((G * max(B, N),), w)
        found.append(filled[w][: G * n].view(G, n) if w else None)
    return found


def _positive(like: torch.Tensor, x: torch.Tensor, shift: int, w_pos: float) -> torch.Tensor | None:
    return like.new_full(x.shape[:2], -w_pos) if w_pos and shift >= 0 else None
