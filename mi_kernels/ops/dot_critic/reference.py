"""The dot-product critic in plain torch with materialised scores: the definition that all other backends follow.

`rows` limits the number of rows of scores that exist at a time; by default all do. Cost: 2 B N D FLOP per pass and 4 B
N bytes per B x N temporary, or 4 rows N bytes with `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .primitives import allowed, dscores, scores, statistics
from .problem import Problem, Slopes, rows_of
from .schema import COL_LSE, NEED_COL_BIAS, NEED_ROW_BIAS, NEED_SCALE, NEED_X, NEED_Y


def _blocks(total: int, rows: int | None) -> list[slice]:
    step = total if rows is None else max(1, rows)
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def _masked_scores(problem: Problem, rows: int | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yields blocks of rows: their slice, their scores and the mask of included pairs."""
    x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift = problem
    for block in _blocks(x.shape[1], rows):
        s = scores(x[:, block], y, scale, rows_of(row_bias, block), col_bias)
        ids = rows_of(row_ids, block)
        yield block, s, allowed(s.shape[1], s.shape[2], block.start, ids, col_ids, pairs, positive_shift, x.device)


def stats(
    problem: Problem, stats: int, clip: float = math.inf, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the scores (schema.py); differentiable, and linear in memory when `rows` is given."""
    parts = []
    for block, s, mask in _masked_scores(problem, rows):
        parts.append(statistics(s, mask, block.start, problem.positive_shift, stats, clip))
    row, col, soft = parts[0]
    for _, other, _ in parts[1:] if stats & COL_LSE else []:
        col = torch.logaddexp(col, other)
    if len(parts) > 1:
        row, soft = torch.cat([p[0] for p in parts], -1), torch.cat([p[2] for p in parts], -1)
    return row, col, soft


def grad(
    problem: Problem, slopes: Slopes, needs: int, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale and the biases from the statistics (schema.py), in the accumulation type."""
    x, y, scale = problem[:3]
    wide = accumulate_dtype(x.dtype)
    xs, ys, factor = x.to(wide), y.to(wide), scale.to(wide)[:, None, None]
    dx, da, dy = [], [], torch.zeros_like(ys)
    dscale = factor.new_zeros(x.shape[0])
    db = factor.new_zeros(y.shape[:2])
    for block, s, mask in _masked_scores(problem, rows):
        d = dscores(s, mask, block.start, problem.positive_shift, slopes.of_rows(block))
        towards_y = d @ ys
        dscale = dscale + (towards_y * xs[:, block]).sum((1, 2))
        dx.append(towards_y * factor)
        dy += d.mT @ (xs[:, block] * factor)
        da.append(d.sum(-1))
        db += d.sum(-2)
    return (
        torch.cat(dx, 1) if needs & NEED_X else factor.new_empty(0),
        dy if needs & NEED_Y else factor.new_empty(0),
        dscale if needs & NEED_SCALE else factor.new_empty(0),
        torch.cat(da, 1) if needs & NEED_ROW_BIAS else factor.new_empty(0),
        db if needs & NEED_COL_BIAS else factor.new_empty(0),
    )
