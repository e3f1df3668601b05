"""Autograd of the operators of the dot-product critic. Callers check the arguments.

Operators return gradients in the accumulation type. They are multiplied by the incoming gradient (the slope) and then
rounded to the dtype of the inputs once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import autograd as common
from ..common.rows import null_rows
from ..common.shapes import reshaped
from . import dispatch, reference
from .problem import LossSettings, Problem, RowSettings, Slopes, flat
from .schema import COL_LSE, GRADIENTS, ROW_LSE, SIGNED

FIELDS = len(Problem._fields)


def _shaped(gradients: Sequence[Tensor], problem: Problem, needs: int) -> list[Tensor | None]:
    """Reshapes gradients from the operators to the shapes of the inputs; None for gradients that are not needed."""
    return [
        reshaped(g, t.shape) if needs & bit and t is not None else None
        for g, t, bit in zip(gradients, problem.differentiable, GRADIENTS, strict=True)
    ]


def _narrow(g: Tensor, t: Tensor, normalize: bool) -> Tensor:
    if g.dtype == t.dtype:
        return g
    # Through F.normalize the gradient of a zero row is 1e12 times the slope, which is infinite in 16 bits. It gets zero
    # instead.
    return (g.masked_fill(null_rows(t), 0) if normalize and t.dim() > 1 else g).to(t.dtype)


def _narrowed(
    gradients: Sequence[Tensor | None], problem: Problem, normalize: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of the inputs, and None for fields of the problem without gradients."""
    found = (
        None if g is None or t is None else _narrow(g, t, normalize)
        for g, t in zip(gradients, problem.differentiable, strict=True)
    )
    return *found, *(None,) * (FIELDS - len(GRADIENTS))


def _again(formula: Any, problem: Problem, needed: Sequence[bool], slopes: Sequence[Tensor | None]) -> Any:
    """Gradients that can be differentiated again, from a torch formula of the problem."""
    wanted = [need and i < len(GRADIENTS) for i, need in enumerate(needed[: len(problem.tensors)])]
    rest = (problem.pairs, problem.positive_shift)
    found = common.differentiable_gradients(
        lambda *tensors: formula(Problem(*[*tensors, *rest])), problem.tensors, wanted, slopes
    )
    return *found, *(None,) * (FIELDS - len(found))


class StatisticsFunction(torch.autograd.Function):
    """Row and column LSEs, softplus sums, and the scores of the positive pairs if there are any.

    The positive scores belong to the same autograd node as the log-sum-exps: near convergence their terms in dS cancel,
    and they must be added before dS is rounded to 16-bit tiles.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # arguments: the problem, stats, backend, and the dtype of the tiles
        problem = Problem(*arguments[:FIELDS])
        stats, backend, tiles = arguments[FIELDS:]
        full = flat(problem, tiles)
        if torch.compiler.is_compiling():
            row, col, soft = torch.ops.mi_kernels.dot_critic_stats(*full, stats, math.inf, backend)
        else:  # a direct call avoids the cost of torch's dispatcher, as for the losses
            row, col, soft = dispatch.run_stats(full, stats, math.inf, backend)
        positive = _positive(full)
        ctx.save_for_backward(*problem.tensors, row, col, positive)
        row, col = row.to(soft.dtype), col.to(soft.dtype)
        ctx.settings = (problem.pairs, problem.positive_shift, stats, backend, tiles)
        ctx.set_materialize_grads(False)
        return row, col, soft, positive

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        *tensors, row, col, positive = ctx.saved_tensors
        pairs, shift, stats, backend, tiles = ctx.settings
        problem = Problem(*[*tensors, pairs, shift])
        if torch.is_grad_enabled() or any(g is not None and common.batched(g) for g in slopes):
            formula = lambda p: differentiable_statistics(p, stats)  # noqa: E731
            with torch.enable_grad():
                return *_again(formula, problem, ctx.needs_input_grad, slopes), None, None, None
        needs = common.needs(ctx.needs_input_grad, GRADIENTS)
        g_row, g_col, g_soft, g_pos = (None if g is None or not g.numel() else g.contiguous() for g in slopes)
        known = Slopes(
            row_lse=row if g_row is not None else None,
            col_lse=col if g_col is not None else None,
            g_row=g_row,
            g_col=g_col,
            g_soft=g_soft,
            g_pos=g_pos,
            soft_signed=bool(stats & SIGNED),
        )
        full = flat(problem, tiles)
        rest: Tensor | None = None
        if g_pos is not None and full.x.dtype.itemsize == 2:
            rest = _rounded_off(full, known, positive)
            known = known._replace(g_pos=g_pos - rest)
        if torch.compiler.is_compiling():
            found = torch.ops.mi_kernels.dot_critic_grad(*full, *known, needs, backend)
        else:
            found = dispatch.run_grad(full, known, needs, backend)
        if rest is not None:
            found = _with_positive_slopes(found, full, rest, needs)
        return *_narrowed(_shaped(found, problem, needs), problem), None, None, None


def _rounded_off(problem: Problem, slopes: Slopes, positive: Tensor) -> Tensor:
    """The rounding error of dS in 16-bit tiles on the positive pairs (i, i), [G, B].

    On these pairs dS is the sum of a slope near -1 and a probability, which cancel after training. The rounding error
    would exceed that of all other pairs. After subtracting it, the tiles represent dS on these pairs exactly.
    """
    assert slopes.g_pos is not None
    total = slopes.g_pos
    if slopes.g_row is not None and slopes.row_lse is not None:
        total = total + slopes.g_row * (positive - slopes.row_lse).exp()
    if slopes.g_col is not None and slopes.col_lse is not None:
        total = total + slopes.g_col * (positive - slopes.col_lse).exp()
    if slopes.g_soft is not None:
        total = total + slopes.g_soft * positive.sigmoid()
    return (total - total.to(problem.x.dtype)).to(positive.dtype)


def _with_positive_slopes(found: Sequence[Tensor], problem: Problem, slopes: Tensor, needs: int) -> list[Tensor]:
    """Adds in place the gradients of additional slopes on the positive pairs (i, i)."""
    x, y = (t.to(slopes.dtype) for t in (problem.x, problem.y))
    scaled = (slopes * problem.scale[:, None])[..., None]
    more = (scaled * y, scaled * x, (slopes * (x * y).sum(-1)).sum(-1), slopes, slopes)
    return [g.add_(m) if needs & bit else g for g, m, bit in zip(found, more, GRADIENTS, strict=True)]


def _positive(problem: Problem) -> Tensor:
    """Scores of the positive pairs, [G, B]; empty if there are none."""
    none = problem.positive_shift < 0
    return problem.scale.new_empty(0) if none else dispatch.positive_scores(problem)


def differentiable_statistics(problem: Problem, stats: int) -> tuple[Tensor, ...]:
    """The outputs of `StatisticsFunction` as a materialising torch formula."""
    problem = flat(problem)
    row, col, soft = reference.stats(problem, stats)
    return row.to(soft.dtype), col.to(soft.dtype), soft, _positive(problem)


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        problem, settings = Problem(*arguments[:FIELDS]), arguments[FIELDS]
        needs = common.needs(ctx.needs_input_grad, GRADIENTS)
        value, gradients = _loss_and_gradients(problem, settings, needs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*problem.tensors, *gradients)
        else:
            # Backward returns the stored gradients without a copy, because nothing else refers to them. A second
            # backward (retain_graph) recomputes them.
            ctx.save_for_backward(*problem.tensors)
            ctx.gradients = gradients
            ctx.wide = problem.x.dtype == problem.scale.dtype  # otherwise gradients must be rounded
        ctx.settings = (problem.pairs, problem.positive_shift, settings, needs)
        return value

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        again, ready = torch.is_grad_enabled(), getattr(ctx, "gradients", None)
        if ready is not None and ctx.wide and not again and common.is_one(g):
            # The root of a backward pass. Reading the saved tensors would cost as much as the rest of this function.
            ctx.gradients = None
            return *ready, *(None,) * (FIELDS + 1 - len(GRADIENTS))
        pairs, shift, settings, needs = ctx.settings
        saved = ctx.saved_tensors
        problem = Problem(*[*saved[: FIELDS - 2], pairs, shift])
        if again:
            formula = lambda p: (differentiable_loss(p, settings),)  # noqa: E731
            return *_again(formula, problem, ctx.needs_input_grad, (g,)), None
        slopes = (g, g, *(g.reshape(-1),) * 3)  # scale and biases have a single, flattened group dimension
        if len(saved) > len(problem.tensors):
            return *_narrowed(common.scaled(saved[len(problem.tensors) :], slopes), problem, settings.normalize), None
        gradients = ready or _loss_and_gradients(problem, settings, needs)[1]
        if common.batched(g):
            return *_narrowed(common.scaled(gradients, slopes), problem, settings.normalize), None
        ctx.gradients = None
        return *_narrowed(common.times(gradients, slopes), problem, settings.normalize), None


def _loss_and_gradients(problem: Problem, settings: LossSettings, needs: int) -> tuple[Tensor, list[Tensor | None]]:
    """The loss [*] and the gradients of the five floating-point inputs in their shapes; None if not needed."""
    weights, normalize, budget, backend, tiles = settings
    full = flat(problem, tiles)
    if torch.compiler.is_compiling():
        run = torch.ops.mi_kernels.dot_critic_loss
        value, *gradients = run(*full, *weights, normalize, needs, budget, backend)
    else:  # a direct call, because torch's dispatcher costs as much as a small loss
        value, *gradients = dispatch.run_loss(full, weights, normalize, needs, budget, backend)
    return reshaped(value, problem.x.shape[:-2]), _shaped(gradients, problem, needs)


def loss_value(problem: Problem, settings: LossSettings) -> Tensor:
    """Only the loss [*], for `no_grad`. (`needs_input_grad` ignores `no_grad`, so `Loss` would compute unused
    gradients.)"""
    return _loss_and_gradients(problem, settings, 0)[0]


def differentiable_loss(problem: Problem, settings: LossSettings) -> Tensor:
    """The loss [*] as a materialising torch formula, for second derivatives."""
    weights, shape = settings.weights, problem.x.shape[:-2]
    problem = flat(problem)
    if settings.normalize:
        problem = dispatch.normalized(problem)
    stats = reference.stats(problem, dispatch.wanted_stats(weights))
    positive = dispatch.positive_scores(problem) if weights.pos and problem.positive_shift >= 0 else None
    return dispatch.compose_loss(stats, positive, weights).reshape(shape)


class RowLosses(torch.autograd.Function):
    """Per-row losses as one autograd node, because launches dominate the time at small batches."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        problem, settings = Problem(*arguments[:FIELDS]), arguments[FIELDS]
        full = flat(problem)
        losses, *known = dispatch.run_row_losses(full, settings, True)
        ctx.save_for_backward(*problem.tensors, *known)
        needs = common.needs(ctx.needs_input_grad, GRADIENTS)
        ctx.settings = (problem.pairs, problem.positive_shift, settings, needs)
        return reshaped(losses, problem.x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        pairs, shift, settings, needs = ctx.settings
        saved: tuple[Any, ...] = ctx.saved_tensors
        problem, known = Problem._make((*saved[: FIELDS - 2], pairs, shift)), saved[FIELDS - 2 :]
        if torch.is_grad_enabled() or common.batched(g):
            formula = lambda p: (differentiable_row_losses(p, settings),)  # noqa: E731
            with torch.enable_grad():
                return *_again(formula, problem, ctx.needs_input_grad, (g,)), None
        full = flat(problem)
        if known[2] is not None and problem.x.dtype == g.dtype:
            # The compiled kernels write gradients in the dtype of the inputs. At small batches the rest of this
            # function would cost as much as the kernels.
            found = dispatch.row_gradients(full, known, g.contiguous(), settings, needs)
            return *_shaped(found, problem, needs), *(None,) * (FIELDS + 1 - len(GRADIENTS))
        slopes = g.reshape(full.x.shape[:2]).to(problem.scale.dtype).contiguous()
        found = dispatch.run_row_losses_grad(full, known, slopes, settings, needs)
        return *_narrowed(_shaped(found, problem, needs), problem, settings.normalize), None


def row_losses_value(problem: Problem, settings: RowSettings) -> Tensor:
    """Only the losses of the rows [*, B], if autograd does not record."""
    return reshaped(dispatch.run_row_losses(flat(problem), settings, False)[0], problem.x.shape[:-1])


def differentiable_row_losses(problem: Problem, settings: RowSettings) -> Tensor:
    """The losses of the rows [*, B] as a materialising torch formula."""
    shape, problem = problem.x.shape[:-1], flat(problem)
    if settings.normalize:
        problem = dispatch.normalized(problem)
    row, col, _ = reference.stats(problem, ROW_LSE | COL_LSE if settings.symmetric else ROW_LSE)
    return dispatch.compose_row_losses(problem, row, col, settings.symmetric).reshape(shape)
