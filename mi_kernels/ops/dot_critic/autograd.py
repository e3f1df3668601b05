"""Autograd of the dot critic's operators. Callers validate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import autograd as handover
from ..common.shapes import grouped, reshaped
from . import dispatch, reference
from .schema import COL_LSE, GRADIENTS, ROW_LSE, SIGNED


def flat(problem: dispatch.Problem) -> dispatch.Problem:
    """x and y with one group dimension, contiguous. Done inside the functions below, where autograd records nothing."""
    return (grouped(problem[0]), grouped(problem[1]), *problem[2:])


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
    return tuple(
        reshaped(g, t.shape) if needs & bit and t is not None else None
        for g, t, bit in zip(gradients, problem[:5], GRADIENTS, strict=True)
    )


class Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift, stats, backend):
        problem = (x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, shift)
        row, col, soft = torch.ops.mi_kernels.dot_critic_stats(*flat(problem), stats, math.inf, backend)
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
            outputs = reference.stats(*flat(problem), stats)
            return *_differentiable(problem, outputs, (g_row, g_col, g_soft)), *(None,) * 6
        needs = handover.needs(ctx.needs_input_grad, GRADIENTS)
        kept = lambda g: None if g is None or not g.numel() else g.contiguous()  # noqa: E731
        g_row, g_col, g_soft = kept(g_row), kept(g_col), kept(g_soft)
        gradients = torch.ops.mi_kernels.dot_critic_grad(
            *flat(problem),
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


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        # the problem, and (w_row, w_col, w_soft, w_pos, soft_signed, normalize, memory budget, backend)
        problem: dispatch.Problem = arguments[:9]
        settings = arguments[9]
        needs = handover.needs(ctx.needs_input_grad, GRADIENTS)
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
        if len(saved) > 7:
            return *handover.scaled(saved[7:], g), *(None,) * 5
        gradients = ctx.gradients or _loss_and_gradients(problem, settings, needs)[1]
        ctx.gradients = None
        return *handover.times(gradients, g), *(None,) * 5


def _loss_and_gradients(problem: dispatch.Problem, settings: tuple, needs: int) -> tuple[Tensor, tuple]:
    """The loss [*] and the gradients of the five float inputs in their shapes, None where they are not needed."""
    run = torch.ops.mi_kernels.dot_critic_loss if torch.compiler.is_compiling() else dispatch.run_loss_flat
    value, *gradients = run(*flat(problem), *settings[:6], needs, *settings[6:])
    return reshaped(value, problem[0].shape[:-2]), _shaped(gradients, problem, needs)


def loss_value(problem: dispatch.Problem, settings: tuple) -> Tensor:
    """The loss [*] alone, where autograd does not record: its function would be told of gradients all the same."""
    return _loss_and_gradients(problem, settings, 0)[0]


def _differentiable_loss(problem: dispatch.Problem, settings: tuple) -> Tensor:
    """The loss [*] as a materialising torch formula, for second derivatives."""
    w_row, w_col, w_soft, w_pos, soft_signed, normalize, *_ = settings
    shape = problem[0].shape[:-2]
    problem = flat(problem)
    if normalize:
        problem = dispatch.normalized(problem)
    stats = reference.stats(*problem, dispatch.wanted_stats(w_row, w_col, w_soft, soft_signed))
    positive = dispatch.positive_scores(problem) if w_pos and problem[8] >= 0 else None
    return dispatch.compose_loss(stats, positive, w_row, w_col, w_soft, w_pos).reshape(shape)


class RowLosses(torch.autograd.Function):
    """The losses of the rows apart: one node for all that leads to them, where small batches are launch-bound."""

    @staticmethod
    def forward(ctx, *arguments):
        problem: dispatch.Problem = arguments[:9]
        symmetric, normalize, backend = arguments[9]
        losses, *known = dispatch.run_row_losses(flat(problem), symmetric, normalize, True, backend)
        ctx.save_for_backward(*problem[:7], *known)
        ctx.settings = (problem[7:], arguments[9])
        return reshaped(losses, problem[0].shape[:-1])

    @staticmethod
    def backward(ctx, g):
        rest, (symmetric, normalize, backend) = ctx.settings
        saved = ctx.saved_tensors
        problem: dispatch.Problem = (*saved[:7], *rest)
        if torch.is_grad_enabled():
            full = dispatch.normalized(flat(problem)) if normalize else flat(problem)
            stats = reference.stats(*full, ROW_LSE | COL_LSE if symmetric else ROW_LSE)
            losses = dispatch.compose_row_losses(full, stats[0], stats[1], symmetric).reshape(g.shape)
            return *_differentiable(problem, (losses,), (g,)), *(None,) * 5
        needs = handover.needs(ctx.needs_input_grad, GRADIENTS)
        slopes = g.reshape(saved[7].shape).to(saved[7].dtype).contiguous()
        found = dispatch.run_row_losses_grad(
            flat(problem), saved[7:], slopes, symmetric, normalize, needs, backend
        )
        return *_shaped(found, problem, needs), *(None,) * 5


def row_losses_value(problem: dispatch.Problem, settings: tuple) -> Tensor:
    """The losses of the rows [*, B] alone, where autograd does not record."""
    symmetric, normalize, backend = settings
    losses = dispatch.run_row_losses(flat(problem), symmetric, normalize, False, backend)[0]
    return reshaped(losses, problem[0].shape[:-1])
