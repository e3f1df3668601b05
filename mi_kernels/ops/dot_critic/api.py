"""Validation and autograd of the dot critic. Every loss and bound over dot-product scores enters here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import FLOATS
from ..shapes import grouped, reshaped
from . import dispatch, reference
from .primitives import accumulate_dtype
from .schema import (
    ALL,
    COL_LSE,
    NEED_COL_BIAS,
    NEED_ROW_BIAS,
    NEED_SCALE,
    NEED_X,
    NEED_Y,
    OFF_DIAGONAL,
    ROW_LSE,
    SIGNED,
    SOFTPLUS,
    UNEQUAL_IDS,
    UNEQUAL_IDS_OR_POSITIVE,
)

PAIRS = {
    "all": ALL,
    "off_diagonal": OFF_DIAGONAL,
    "unequal_ids": UNEQUAL_IDS,
    "unequal_ids_or_positive": UNEQUAL_IDS_OR_POSITIVE,
}
_STATS = {"row_lse": ROW_LSE, "col_lse": COL_LSE, "row_softplus": SOFTPLUS}


class Statistics(NamedTuple):
    """What was asked for; None elsewhere. LSEs in nats, fp32 (fp64 for fp64)."""

    row_lse: Tensor | None  # [*, B]
    col_lse: Tensor | None  # [*, N]
    row_softplus: Tensor | None  # [*, B]


class Prepared(NamedTuple):
    """Inputs in the operators' form, but for x and y, which keep the caller's shape until `_flat`."""

    problem: dispatch.Problem
    shape: torch.Size  # the caller's group dimensions


def _features(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() < 2:
        raise ValueError(f"{name} must have shape [*, batch, features], got {tuple(t.shape)}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
    if 0 in t.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(t.shape)}")


def _vector(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor, ids: bool = False) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, x is on {like.device}")
    if ids and (t.is_floating_point() or t.is_complex()):
        raise ValueError(f"{name} must hold integers, got {t.dtype}")
    try:
        t = t.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}") from None
    t = t.reshape(-1, shape[-1])
    return (t.long() if ids else t.to(accumulate_dtype(like.dtype))).contiguous()


def _scale(scale: Tensor | float, shape: torch.Size, like: Tensor) -> Tensor:
    """[G] in the accumulation type, from a number, a one-element tensor or [*]."""
    wide = accumulate_dtype(like.dtype)
    if not isinstance(scale, Tensor):
        return torch.full((shape.numel(),), float(scale), dtype=wide, device=like.device)
    if scale.device != like.device and scale.dim():
        raise ValueError(f"scale is on {scale.device}, x is on {like.device}")
    if scale.numel() != 1 and scale.shape != shape:
        raise ValueError(f"scale must be a number, a 0-d tensor or have shape {tuple(shape)}, got {tuple(scale.shape)}")
    flat = scale.reshape(-1).to(like.device, wide)
    return flat.expand(shape.numel()).contiguous()


def prepare(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    pairs: str = "all",
    positive_shift: int = -1,
) -> Prepared:
    """Checks the inputs and brings them to the operators' form. Raises ValueError or TypeError naming the argument."""
    _features("x", x)
    _features("y", y)
    if x.dtype != y.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x and y must have one dtype, got {x.dtype} and {y.dtype}")
        short = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(short), y.to(short)
    if x.device != y.device:
        raise ValueError(f"y is on {y.device}, x is on {x.device}")
    if x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must agree in all but the batch dimension")
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    if pairs.startswith("unequal") and (row_ids is None or col_ids is None):
        raise ValueError(f"pairs={pairs!r} needs row_ids and col_ids")
    if positive_shift >= 0 and (
        pairs == "unequal_ids" or (pairs == "off_diagonal" and positive_shift % y.shape[-2] == 0)
    ):
        raise ValueError(f"positive_shift={positive_shift} names pairs that pairs={pairs!r} leaves out")
    if x is y:
        y = x.view_as(x)  # a function that is compiled takes a tensor once
    shape, rows, columns = x.shape[:-2], x.shape[:-1], y.shape[:-1]
    problem = (
        x,
        y,
        _scale(scale, shape, x),
        None if row_bias is None else _vector("row_bias", row_bias, rows, x),
        None if col_bias is None else _vector("col_bias", col_bias, columns, x),
        None if row_ids is None else _vector("row_ids", row_ids, rows, x, ids=True),
        None if col_ids is None else _vector("col_ids", col_ids, columns, x, ids=True),
        PAIRS[pairs],
        positive_shift,
    )
    return Prepared(problem, shape)


def _flat(problem: dispatch.Problem) -> dispatch.Problem:
    """x and y with one group dimension, contiguous. Done inside the functions below, where autograd records nothing."""
    return (grouped(problem[0]), grouped(problem[1]), *problem[2:])


def _needs(flags: tuple[bool, ...]) -> int:
    bits = (NEED_X, NEED_Y, NEED_SCALE, NEED_ROW_BIAS, NEED_COL_BIAS)
    return sum(bit for bit, wanted in zip(bits, flags, strict=False) if wanted)


def _differentiable(problem: dispatch.Problem, outputs, gradients) -> tuple[Tensor | None, ...]:
    """Gradients of the five float inputs that can be differentiated again."""
    inputs = [t for t in problem[:5] if t is not None and t.requires_grad]
    kept = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in kept], inputs, [g for _, g in kept], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in problem[:5])


def _shaped(gradients: Sequence[Tensor], problem: dispatch.Problem, needs: int) -> tuple[Tensor | None, ...]:
    """Gradients from the operators in the shapes of the inputs, None where they are not needed."""
    bits = (NEED_X, NEED_Y, NEED_SCALE, NEED_ROW_BIAS, NEED_COL_BIAS)
    return tuple(
        reshaped(g, t.shape) if needs & bit and t is not None else None
        for g, t, bit in zip(gradients, problem[:5], bits, strict=True)
    )


class _StatisticsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift, stats, backend):
        problem = (x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift)
        row, col, soft = torch.ops.mi_kernels.dot_critic_stats(*_flat(problem), stats, math.inf, backend)
        ctx.save_for_backward(x, y, scale, row_bias, col_bias, row_ids, col_ids, row, col)
        ctx.settings = (pairs, shift, stats, backend)
        ctx.set_materialize_grads(False)
        return row, col, soft

    @staticmethod
    def backward(ctx, g_row, g_col, g_soft):
        *tensors, row, col = ctx.saved_tensors
        pairs, shift, stats, backend = ctx.settings
        problem: dispatch.Problem = (*tensors, pairs, shift)
        if torch.is_grad_enabled():
            outputs = reference.stats(*_flat(problem), stats)
            return *_differentiable(problem, outputs, (g_row, g_col, g_soft)), *(None,) * 6
        needs = _needs(ctx.needs_input_grad)
        kept = lambda g: None if g is None or not g.numel() else g.contiguous()  # noqa: E731
        g_row, g_col, g_soft = kept(g_row), kept(g_col), kept(g_soft)
        gradients = torch.ops.mi_kernels.dot_critic_grad(
            *_flat(problem),
            row if g_row is not None else None,
            col if g_col is not None else None,
            g_row,
            g_col,
            g_soft,
            None,
            bool(stats & SIGNED),
            needs,
            backend,
        )
        return *_shaped(gradients, problem, needs), *(None,) * 6


class _LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        # the problem, and (w_row, w_col, w_soft, w_pos, soft_signed, normalize, memory budget, backend)
        problem: dispatch.Problem = arguments[:9]
        settings = arguments[9]
        needs = _needs(ctx.needs_input_grad)
        value, gradients = _loss_and_gradients(problem, settings, needs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*problem[:7], *gradients)
        else:
            # Gradients are handed over in backward, not copied: nothing else holds them, and whoever goes back a
            # second time (retain_graph) has them computed again.
            ctx.save_for_backward(*problem[:7])
            ctx.gradients = gradients
        ctx.settings = (problem[7:], settings, needs)
        return value

    @staticmethod
    def backward(ctx, g):
        rest, settings, needs = ctx.settings
        saved = ctx.saved_tensors
        problem: dispatch.Problem = (*saved[:7], *rest)
        if torch.is_grad_enabled():
            return *_differentiable(problem, (_differentiable_loss(problem, settings),), (g,)), *(None,) * 5
        factor = lambda t: g.reshape(*g.shape, *(1,) * (t.dim() - g.dim()))  # noqa: E731
        if len(saved) > 7:
            scaled = lambda t: (t * factor(t)).to(t.dtype)  # noqa: E731
            return *(None if t is None else scaled(t) for t in saved[7:]), *(None,) * 5
        gradients = ctx.gradients or _loss_and_gradients(problem, settings, needs)[1]
        ctx.gradients = None
        if g.dim() or g.device.type != "cpu" or g.item() != 1.0:  # a GPU would have to wait for the last question
            for t in gradients:
                if t is not None:
                    t.mul_(factor(t))
        return *gradients, *(None,) * 5


def _loss_and_gradients(problem: dispatch.Problem, settings: tuple, needs: int) -> tuple[Tensor, tuple]:
    """The loss [*] and the gradients of the five float inputs in their shapes, None where they are not needed."""
    run = torch.ops.mi_kernels.dot_critic_loss if torch.compiler.is_compiling() else dispatch.run_loss_flat
    value, *gradients = run(*_flat(problem), *settings[:6], needs, *settings[6:])
    return reshaped(value, problem[0].shape[:-2]), _shaped(gradients, problem, needs)


def _differentiable_loss(problem: dispatch.Problem, settings: tuple) -> Tensor:
    """The loss [*] as a materialising torch formula, for second derivatives."""
    w_row, w_col, w_soft, w_pos, soft_signed, normalize, *_ = settings
    shape = problem[0].shape[:-2]
    problem = _flat(problem)
    if normalize:
        problem = dispatch.normalized(problem)
    stats = reference.stats(*problem, dispatch.wanted_stats(w_row, w_col, w_soft, soft_signed))
    positive = dispatch.positive_scores(problem) if w_pos and problem[8] >= 0 else None
    return dispatch.compose_loss(stats, positive, w_row, w_col, w_soft, w_pos).reshape(shape)


def _clipped(problem: dispatch.Problem, bits: int, clip: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    with torch.no_grad():
        return torch.ops.mi_kernels.dot_critic_stats(*_flat(problem), bits, float(clip), backend)


def statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    pairs: str = "all",
    stats: tuple[str, ...] = ("row_lse",),
    clip: float | None = None,
    backend: str | None = None,
) -> Statistics:
    """Statistics of S = scale x y^T + row_bias + col_bias that is never stored.

    x [*, B, D], y [*, N, D]; scale a float, a 0-d tensor or [*]; biases [*, B] and [*, N]; ids integers of the same
    shapes. `pairs`: "all", "off_diagonal" (i != j) or "unequal_ids". `stats`: any of "row_lse" [*, B], "col_lse"
    [*, N], "row_softplus" [*, B] (sum_j softplus S_ij). A row without pairs has LSE -inf. Differentiable twice in x,
    y, scale and the biases. `clip` clamps the scores that enter the LSEs to [-clip, clip]; the statistics then carry no
    gradient. Cost: 2 B N D FLOP forward, 6 B N D backward, O((B + N) D) memory.
    Raises ValueError or TypeError that names the argument, RuntimeError if a backend that was named cannot run.
    """
    unknown = set(stats) - set(_STATS)
    if unknown or not stats:
        raise ValueError(f"stats must name some of {', '.join(_STATS)}, got {stats!r}")
    prepared = prepare(x, y, scale, row_bias=row_bias, col_bias=col_bias, row_ids=row_ids, col_ids=col_ids, pairs=pairs)
    bits = sum(_STATS[name] for name in set(stats))
    if clip is None:
        found = _StatisticsFunction.apply(*prepared.problem, bits, backend or "")
    else:
        found = _clipped(prepared.problem, bits, clip, backend or "")
    return Statistics(
        *(t.reshape(*prepared.shape, -1) if bits & bit else None for t, bit in zip(found, _STATS.values(), strict=True))
    )


def loss(
    prepared: Prepared,
    *,
    w_row: float = 0.0,
    w_col: float = 0.0,
    w_soft: float = 0.0,
    w_pos: float = 0.0,
    soft_signed: bool = False,
    normalize: bool = False,
    memory_budget: int = 0,
    backend: str | None = None,
) -> Tensor:
    """w_row sum_i row_lse_i + w_col sum_j col_lse_j + w_soft sum_ij softplus(S_ij) - w_pos sum_i S_i,pos(i), [*].

    `normalize` brings the rows of x and y to unit length first. Gradients are computed with the value
    when an input requires them: 3N one-sided, 4N with both LSEs (3N where `memory_budget` bytes hold the scores),
    N = 2 B N D FLOP.
    """
    settings = (w_row, w_col, w_soft, w_pos, soft_signed, normalize, memory_budget, backend or "")
    return _LossFunction.apply(*prepared.problem, settings)


def row_losses(prepared: Prepared, *, symmetric: bool = False, backend: str | None = None) -> Tensor:
    """row_lse_i - S_i,pos(i) for every row, [*, B]; symmetric averages it with the positive column's. 4N FLOP."""
    bits = ROW_LSE | COL_LSE if symmetric else ROW_LSE
    row, col, _ = _StatisticsFunction.apply(*prepared.problem, bits, backend or "")
    positive = dispatch.positive_scores(_flat(prepared.problem))
    losses = (row + col) / 2 - positive if symmetric else row - positive
    return losses.reshape(*prepared.shape, -1)
