"""Runs the dot critic's operators on a backend. Kernels are imported when they are first used."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import resolve
from ..common.dtypes import accumulate_dtype
from . import cuda, reference
from .primitives import positives
from .schema import COL_LSE, GRADIENTS, ROW_LSE, SIGNED, SOFTPLUS, library

_CHUNK_BYTES = 32 << 20
# x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift
Problem = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int]
# row_lse, col_lse, g_row, g_col, g_soft, g_pos, soft_signed
Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]


def _rows(x: Tensor, y: Tensor) -> int:
    """Rows of scores that fit the chunk buffer."""
    return max(1, _CHUNK_BYTES // (8 * x.shape[0] * y.shape[1]))


def run_stats(problem: Problem, stats: int, clip: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    name = resolve("dot_critic", problem[0].device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_stats(*problem, stats, clip)
    if name == "triton":
        from . import triton_forward

        return triton_forward.stats(*problem, stats, clip)
    if name == "cuda":
        return cuda.stats(problem, stats, clip)
    rows = _rows(problem[0], problem[1]) if name == "chunked" else None
    return reference.stats(*problem, stats, clip, rows=rows)


def run_grad(problem: Problem, weights: Weights, needs: int, backend: str) -> tuple[Tensor, ...]:
    name = resolve("dot_critic", problem[0].device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_grad(*problem, *weights, needs)
    if name == "triton":
        from . import triton_backward

        full = triton_backward.grad(*problem, *weights)
        return tuple(g if needs & bit else g.new_empty(0) for g, bit in zip(full, GRADIENTS, strict=True))
    if name == "cuda":
        return cuda.grad(problem, weights, needs)
    rows = _rows(problem[0], problem[1]) if name == "chunked" else None
    return reference.grad(*problem, *weights, needs, rows=rows)


def positive_scores(problem: Problem) -> Tensor:
    """S[i, (i + shift) mod N], [G, B], differentiable, O(B D)."""
    x, y, scale, row_bias, col_bias, _, _, _, shift = problem
    wide = accumulate_dtype(x.dtype)
    j = positives(0, x.shape[1], y.shape[1], shift, x.device)
    s = (x.to(wide) * y.to(wide)[:, j]).sum(-1) * scale.to(wide)[:, None]
    if row_bias is not None:
        s = s + row_bias.to(wide)
    return s if col_bias is None else s + col_bias.to(wide)[:, j]


def compose_loss(
    stats: tuple[Tensor, Tensor, Tensor],
    positive: Tensor | None,
    w_row: float,
    w_col: float,
    w_soft: float,
    w_pos: float,
) -> Tensor:
    """The loss of schema.py from its statistics, [G]."""
    row, col, soft = stats
    terms = []
    share = min(w_row, w_pos) if positive is not None else 0.0
    if w_row:
        paired = w_row * row if positive is None else w_row * row - share * positive
        terms.append(paired.sum(-1))
    if w_col:
        terms.append(w_col * col.sum(-1))
    if w_soft:
        terms.append(w_soft * soft.sum(-1))
    if positive is not None and w_pos != share:
        terms.append(-(w_pos - share) * positive.sum(-1))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def wanted_stats(w_row: float, w_col: float, w_soft: float, soft_signed: bool) -> int:
    bits = (ROW_LSE if w_row else 0) | (COL_LSE if w_col else 0)
    return bits | ((SOFTPLUS | (SIGNED if soft_signed else 0)) if w_soft else 0)


def normalized(problem: Problem) -> Problem:
    """The same problem on rows of unit length, in the accumulation type; differentiable."""
    wide = accumulate_dtype(problem[0].dtype)
    x, y = (F.normalize(t.to(wide), dim=-1) for t in problem[:2])
    return (x, y, *problem[2:])


def through_normalization(t: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of t from that of F.normalize(t)."""
    if not gradient.numel():
        return t.new_empty(0)
    wide = t.to(accumulate_dtype(t.dtype))
    gradient = gradient.to(wide.dtype)
    norm = wide.norm(dim=-1, keepdim=True)
    unit = wide / norm.clamp(min=1e-12)
    dot = torch.where(norm > 1e-12, (unit * gradient).sum(-1, keepdim=True), 0)
    return ((gradient - unit * dot) / norm.clamp(min=1e-12)).to(t.dtype)


def run_loss(
    problem: Problem,
    w_row: float,
    w_col: float,
    w_soft: float,
    w_pos: float,
    soft_signed: bool,
    normalize: bool,
    needs: int,
    memory_budget: int,
    backend: str,
) -> tuple[Tensor, ...]:
    x, y = problem[:2]
    name = resolve("dot_critic", x.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_loss(
            *problem, w_row, w_col, w_soft, w_pos, soft_signed, normalize, needs, memory_budget
        )
    if name == "triton":
        from . import triton_loss

        return triton_loss.loss(problem, w_row, w_col, w_soft, w_pos, soft_signed, normalize, needs)
    if normalize:
        rest = (w_row, w_col, w_soft, w_pos, soft_signed, False, needs, memory_budget, backend)
        unit = normalized(problem)
        if name == "cuda":  # 16-bit rows stay 16-bit: in fp32 they would miss the tensor cores' faster products
            unit = (unit[0].to(x.dtype), unit[1].to(y.dtype), *unit[2:])
        loss, dx, dy, *others = run_loss(unit, *rest)
        return loss, through_normalization(x, dx), through_normalization(y, dy), *others
    stats = run_stats(problem, wanted_stats(w_row, w_col, w_soft, soft_signed), math.inf, backend)
    positive = positive_scores(problem) if w_pos and problem[8] >= 0 else None
    loss = compose_loss(stats, positive, w_row, w_col, w_soft, w_pos)
    if not needs:
        none = loss.new_empty(0)
        return loss, x.new_empty(0), x.new_empty(0), none, none.clone(), none.clone()
    full = lambda w, n: loss.new_full((x.shape[0], n), w) if w else None  # noqa: E731
    weights = (
        stats[0] if w_row else None,
        stats[1] if w_col else None,
        full(w_row, x.shape[1]),
        full(w_col, y.shape[1]),
        full(w_soft, x.shape[1]),
        full(-w_pos, x.shape[1]) if positive is not None else None,
        soft_signed,
    )
    return loss, *run_grad(problem, weights, needs, backend)


def compose_row_losses(problem: Problem, row: Tensor, col: Tensor, symmetric: bool) -> Tensor:
    """row_lse_i - S_i,pos(i), or its mean with the column's, [G, B]."""
    return ((row + col) / 2 if symmetric else row) - positive_scores(problem)


def _units(problem: Problem) -> Problem:
    """Rows of unit length in the dtype that was given: 16-bit rows stay 16-bit tiles."""
    unit = normalized(problem)
    return (unit[0].to(problem[0].dtype), unit[1].to(problem[1].dtype), *problem[2:])


def run_row_losses(
    problem: Problem, symmetric: bool, normalize: bool, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The losses, the LSEs of rows and of columns, and what is kept for the gradient besides them."""
    # the extension takes rows apart itself; a graph that is compiled needs operators with shape functions
    if not torch.compiler.is_compiling() and resolve("dot_critic", problem[0].device, backend or None) == "cpu":
        return torch.ops.mi_kernels_cpu.dot_critic_row_losses(*problem, symmetric, normalize, keep)
    unit = _units(problem) if normalize else problem
    wanted = ROW_LSE | COL_LSE if symmetric else ROW_LSE
    row, col, _ = torch.ops.mi_kernels.dot_critic_stats(*unit, wanted, math.inf, backend)
    return compose_row_losses(unit, row, col, symmetric), row, col, None


def run_row_losses_grad(
    problem: Problem,
    known: tuple[Tensor, Tensor, Tensor | None],
    g: Tensor,
    symmetric: bool,
    normalize: bool,
    needs: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of the five float inputs under slopes g [G, B], from what `run_row_losses` returned."""
    row, col, kept = known
    if kept is not None:
        return torch.ops.mi_kernels_cpu.dot_critic_row_losses_grad(
            *problem, row, col, kept, g, symmetric, normalize, needs
        )
    unit = _units(problem) if normalize else problem
    half = g / 2 if symmetric else g
    weights = (row, col if symmetric else None, half, half if symmetric else None, None, -g, False)
    found = torch.ops.mi_kernels.dot_critic_grad(*unit, *weights, needs, backend)
    if not normalize:
        return found
    dx, dy = (through_normalization(t, d) for t, d in zip(problem[:2], found[:2], strict=True))
    return dx, dy, *found[2:]


def _stats_op(x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift, stats, clip, backend):
    return run_stats((x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift), stats, clip, backend)


def _grad_op(
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
    problem = (x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift)
    return run_grad(problem, (row_lse, col_lse, g_row, g_col, g_soft, g_pos, soft_signed), needs, backend)


def run_loss_flat(x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift, *rest):
    return run_loss((x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift), *rest)


for _name, _function in (("stats", _stats_op), ("grad", _grad_op), ("loss", run_loss_flat)):
    for _key in ("CPU", "CUDA"):
        library.impl(f"dot_critic_{_name}", _function, _key)
