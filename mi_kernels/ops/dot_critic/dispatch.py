"""Runs the operators of the dot-product critic on a backend. Kernels are imported on first use."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import resolve
from ..common.arguments import split
from ..common.dtypes import accumulate_dtype, lse_dtype
from ..common.precision import outside_autocast
from . import cuda, reference
from .primitives import positives
from .problem import Problem, RowSettings, Slopes, Weights
from .schema import COL_LSE, GRADIENTS, ROW_LSE, SIGNED, SOFTPLUS, library

_CHUNK_BYTES = 32 << 20


def _rows(x: Tensor, y: Tensor) -> int:
    """The number of rows of scores that fit the chunk buffer."""
    return max(1, _CHUNK_BYTES // (8 * x.shape[0] * y.shape[1]))


@outside_autocast
def run_stats(problem: Problem, stats: int, clip: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    name = resolve("dot_critic", problem.x.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_stats(*problem, stats, clip)
    if name == "triton":
        from . import triton_forward

        return triton_forward.stats(*problem, stats, clip)
    if name == "cuda":
        row, col, soft = cuda.stats(problem, stats, clip)  # the kernels round log-sum-exps to fp32
        wide = lse_dtype(row.device)
        return row.to(wide), col.to(wide), soft
    rows = _rows(problem.x, problem.y) if name == "chunked" else None
    return reference.stats(problem, stats, clip, rows)


@outside_autocast
def run_grad(problem: Problem, slopes: Slopes, needs: int, backend: str) -> tuple[Tensor, ...]:
    name = resolve("dot_critic", problem.x.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_grad(*problem, *slopes, needs)
    if name == "triton":
        from . import triton_backward

        return triton_backward.grad(*problem, *slopes, needs)
    if name == "cuda":
        row, col = (None if t is None else t.float() for t in slopes[:2])
        return cuda.grad(problem, slopes._replace(row_lse=row, col_lse=col), needs)
    rows = _rows(problem.x, problem.y) if name == "chunked" else None
    return reference.grad(problem, slopes, needs, rows)


def positive_scores(problem: Problem) -> Tensor:
    """S[i, (i + shift) mod N], [G, B], differentiable, O(B D)."""
    x, y, dtype = problem.x, problem.y, accumulate_dtype(problem.x.dtype)
    y, col_bias = y.to(dtype), problem.col_bias
    if problem.positive_shift != 0 or x.shape[1] != y.shape[1]:  # otherwise positives are the diagonal
        j = positives(0, x.shape[1], y.shape[1], problem.positive_shift, x.device)
        y, col_bias = y[:, j], None if col_bias is None else col_bias[:, j]
    s = (x.to(dtype) * y).sum(-1) * problem.scale.to(dtype)[:, None]
    for bias in (problem.row_bias, col_bias):
        s = s if bias is None else s + bias.to(dtype)
    return s


def compose_loss(stats: tuple[Tensor, Tensor, Tensor], positive: Tensor | None, weights: Weights) -> Tensor:
    """The loss of schema.py from its statistics, [G], in the dtype of `soft`."""
    row, col, soft = stats
    terms = []
    share = min(weights.row, weights.pos) if positive is not None else 0.0
    if weights.row:
        paired = weights.row * row if positive is None else weights.row * row - share * positive
        terms.append(paired.sum(-1))
    if weights.col:
        terms.append(weights.col * col.sum(-1))
    if weights.soft:
        terms.append(weights.soft * soft.sum(-1))
    if positive is not None and weights.pos != share:
        terms.append(-(weights.pos - share) * positive.sum(-1))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(soft.dtype)


def wanted_stats(weights: Weights) -> int:
    bits = (ROW_LSE if weights.row else 0) | (COL_LSE if weights.col else 0)
    return bits | ((SOFTPLUS | (SIGNED if weights.soft_signed else 0)) if weights.soft else 0)


def normalized(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The problem with normalised rows, in the accumulation type or in `dtype`; differentiable."""
    wide = accumulate_dtype(problem.x.dtype)
    x, y = (F.normalize(t.to(wide), dim=-1).to(dtype or wide) for t in (problem.x, problem.y))
    return problem._replace(x=x, y=y)


def through_normalization(t: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of t from that of F.normalize(t), in the accumulation type."""
    if not gradient.numel():
        return gradient
    wide = t.to(accumulate_dtype(t.dtype))
    gradient = gradient.to(wide.dtype)
    norm = wide.norm(dim=-1, keepdim=True)
    unit = wide / norm.clamp(min=1e-12)
    dot = torch.where(norm > 1e-12, (unit * gradient).sum(-1, keepdim=True), 0)
    return (gradient - unit * dot) / norm.clamp(min=1e-12)


@outside_autocast
def run_loss(
    problem: Problem, weights: Weights, normalize: bool, needs: int, memory_budget: int, backend: str
) -> tuple[Tensor, ...]:
    x, y = problem.x, problem.y
    name = resolve("dot_critic", x.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_loss(*problem, *weights, normalize, needs, memory_budget)
    if name == "triton":
        from . import triton_loss

        return triton_loss.loss(problem, *weights, normalize, needs)
    if normalize:
        # The CUDA kernels keep 16-bit rows in 16 bits, because fp32 products are slower on tensor cores.
        unit = normalized(problem, x.dtype if name == "cuda" else None)
        loss, dx, dy, *others = run_loss(unit, weights, False, needs, memory_budget, backend)
        return loss, through_normalization(x, dx), through_normalization(y, dy), *others
    stats = run_stats(problem, wanted_stats(weights), math.inf, backend)
    positive = positive_scores(problem) if weights.pos and problem.positive_shift >= 0 else None
    loss = compose_loss(stats, positive, weights)
    if not needs:
        return loss, *(loss.new_empty(0) for _ in GRADIENTS)
    full = lambda w, n: loss.new_full((x.shape[0], n), w) if w else None  # noqa: E731
    slopes = Slopes(
        row_lse=stats[0] if weights.row else None,
        col_lse=stats[1] if weights.col else None,
        g_row=full(weights.row, x.shape[1]),
        g_col=full(weights.col, y.shape[1]),
        g_soft=full(weights.soft, x.shape[1]),
        g_pos=full(-weights.pos, x.shape[1]) if positive is not None else None,
        soft_signed=weights.soft_signed,
    )
    return loss, *run_grad(problem, slopes, needs, backend)


def compose_row_losses(problem: Problem, row: Tensor, col: Tensor, symmetric: bool) -> Tensor:
    """row_lse_i - S_i,pos(i), [G, B]; if symmetric, its mean with the same quantity of the column."""
    positive = positive_scores(problem)
    return (((row + col) / 2 if symmetric else row) - positive).to(positive.dtype)


def run_row_losses(problem: Problem, settings: RowSettings, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The losses, the row and column statistics for the gradient, and the scores if they are kept (otherwise None)."""
    symmetric, normalize, backend = settings
    # A compiled graph needs operators with shape functions: the extension's own operators have none.
    if not torch.compiler.is_compiling() and resolve("dot_critic", problem.x.device, backend or None) == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_row_losses(*problem, symmetric, normalize, keep)
    return _composed_row_losses(problem, settings)


@outside_autocast
def _composed_row_losses(problem: Problem, settings: RowSettings) -> tuple[Tensor, Tensor, Tensor, None]:
    symmetric, normalize, backend = settings
    unit = normalized(problem, problem.x.dtype) if normalize else problem
    wanted = ROW_LSE | COL_LSE if symmetric else ROW_LSE
    row, col, _ = torch.ops.mi_kernels.dot_critic_stats(*unit, wanted, math.inf, backend)
    return compose_row_losses(unit, row, col, symmetric), row, col, None


def row_gradients(
    problem: Problem, known: tuple[Tensor, ...], g: Tensor, settings: RowSettings, needs: int
) -> tuple[Tensor, ...]:
    """`run_row_losses_grad` with the compiled kernels, which stored scores in `known`; g holds G B contiguous
    slopes."""
    arguments = (*problem, *known, g, settings.symmetric, settings.normalize, needs)
    return torch.ops.mi_kernels_cpu.dot_critic_row_losses_grad(*arguments)


@outside_autocast
def run_row_losses_grad(
    problem: Problem, known: tuple[Tensor, Tensor, Tensor | None], g: Tensor, settings: RowSettings, needs: int
) -> tuple[Tensor, ...]:
    """Gradients of the five floating-point inputs for slopes g [G, B], from the results of `run_row_losses`."""
    symmetric, normalize, backend = settings
    row, col, kept = known
    if kept is not None:
        return row_gradients(problem, (row, col, kept), g, settings, needs)
    unit = normalized(problem, problem.x.dtype) if normalize else problem
    half = g / 2 if symmetric else g
    slopes = Slopes(row, col if symmetric else None, half, half if symmetric else None, None, -g)
    found = torch.ops.mi_kernels.dot_critic_grad(*unit, *slopes, needs, backend)
    if not normalize:
        return found
    dx, dy = (through_normalization(t, d) for t, d in zip((problem.x, problem.y), found[:2], strict=True))
    return dx, dy, *found[2:]


def _stats_op(*arguments: Any) -> tuple[Tensor, ...]:
    return run_stats(*split(arguments, Problem))


def _grad_op(*arguments: Any) -> tuple[Tensor, ...]:
    return run_grad(*split(arguments, Problem, Slopes))


def _loss_op(*arguments: Any) -> tuple[Tensor, ...]:
    return run_loss(*split(arguments, Problem, Weights))


for _name, _function in (("stats", _stats_op), ("grad", _grad_op), ("loss", _loss_op)):
    for _key in ("CPU", "CUDA"):
        library.impl(f"dot_critic_{_name}", _function, _key)
