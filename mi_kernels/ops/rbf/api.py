"""Autograd of the sums of Gaussian kernels over pairs. Callers check the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.autograd import batched, differentiable_gradients, needs, scaled, times
from ..common.checks import backend_name
from . import dispatch, reference
from . import hsic as hsic_formulas
from .schema import NEED_BANDWIDTH, NEED_BANDWIDTH_Y, NEED_X, NEED_Y

Gradients = tuple[Tensor | None, ...]


class _MMDFunction(torch.autograd.Function):
    # The gradients for an incoming gradient of 1 are computed together with the value, so pairs are computed only once.
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bandwidth: Any, *settings: Any) -> Any:
        wanted = needs(ctx.needs_input_grad, (NEED_X, NEED_Y, NEED_BANDWIDTH))
        found, gradients = _mmd_and_gradients(x, y, bandwidth, settings, wanted)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x, y, bandwidth, *gradients)
        else:  # backward gives the stored gradients away; a second backward recomputes them
            ctx.save_for_backward(x, y, bandwidth)
            ctx.gradients = gradients
        ctx.settings, ctx.wanted = settings, wanted
        return found

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        x, y, bandwidth, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = partial(_mmd_formula, ctx.settings[:3])
            again = differentiable_gradients(formula, (x, y, bandwidth), ctx.needs_input_grad[:3], (g,))
            return *again, *(None,) * 4
        if kept:
            return *scaled(kept, [g] * 3), *(None,) * 4
        gradients = ctx.gradients or _mmd_and_gradients(x, y, bandwidth, ctx.settings, ctx.wanted)[1]
        ctx.gradients = None
        return *(scaled if batched(g) else times)(gradients, [g] * 3), *(None,) * 4


def _mmd_formula(weights: Sequence[float], x: Tensor, y: Tensor, bandwidth: Tensor) -> tuple[Tensor]:
    return (reference.value(x, y, bandwidth, *weights),)


def _mmd_and_gradients(
    x: Tensor, y: Tensor, bandwidth: Tensor, settings: tuple[Any, ...], wanted: int
) -> tuple[Tensor, Gradients]:
    w_xx, w_yy, w_xy, backend = settings
    run = torch.ops.mi_kernels.rbf_mmd if torch.compiler.is_compiling() else dispatch.mmd
    found, *gradients = run(x.contiguous(), y.contiguous(), bandwidth, w_xx, w_yy, w_xy, wanted, backend)
    bits = (NEED_X, NEED_Y, NEED_BANDWIDTH)
    return found, tuple(t if wanted & bit else None for t, bit in zip(gradients, bits, strict=True))


def mmd(
    x: Tensor, y: Tensor, bandwidth: Tensor, w_xx: float, w_yy: float, w_xy: float, backend: str | None = None
) -> Tensor:
    """The weighted kernel sums of schema.py, [G] in fp64. x [G, B, D], y [G, N, D], bandwidth [G, K]."""
    problem = (x, y, bandwidth.contiguous())
    settings = (w_xx, w_yy, w_xy, backend_name(backend))
    if transforms.active():
        run = partial(_grouped, lambda *t: _MMDFunction.apply(*t, *settings))
        return transforms.apply(_operator(run, partial(_mmd_formula, settings[:3])), *problem)[0]
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad, so apply would compute unused gradients
        return _mmd_and_gradients(*problem, settings, 0)[0]
    return _MMDFunction.apply(*problem, *settings)


def _operator(run: Callable[..., tuple[Tensor]], formula: Callable[..., tuple[Tensor]]) -> transforms.Operator:
    return transforms.Operator(run, lambda lead, *tensors: formula(*tensors))


def _grouped(function: Callable[..., Tensor], lead: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor]:
    """Applies function to tensors [*lead, G, ...] with `lead` folded into the groups."""
    found = function(*(t.flatten(0, len(lead)).contiguous() for t in tensors))
    return (found.unflatten(0, (*lead, -1)) if lead else found,)


class _HSICFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, backend: str) -> Any:
        run = torch.ops.mi_kernels.rbf_hsic if torch.compiler.is_compiling() else dispatch.hsic_forward
        products, rows = run(x, y, sx, sy, backend)
        ctx.save_for_backward(x, y, sx, sy, rows)
        ctx.backend = backend
        return hsic_formulas.combine(products, *rows.unbind(1))

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        x, y, sx, sy, rows = ctx.saved_tensors
        problem = (x, y, sx, sy)
        if torch.is_grad_enabled():
            return *differentiable_gradients(_hsic_formula, problem, ctx.needs_input_grad[:4], (g,)), None
        bits = (NEED_X, NEED_Y, NEED_BANDWIDTH, NEED_BANDWIDTH_Y)
        wanted = needs(ctx.needs_input_grad, bits)
        run = torch.ops.mi_kernels.rbf_hsic_grad if torch.compiler.is_compiling() else dispatch.hsic_backward

        def under(slope: Tensor) -> Gradients:
            found = run(x, y, sx, sy, rows, slope.contiguous(), wanted, ctx.backend)
            return tuple(t if wanted & bit else None for t, bit in zip(found, bits, strict=True))

        return *(_under_batched(under, g, rows) if batched(g) else under(g)), None


def _under_batched(under: Callable[[Tensor], Gradients], g: Tensor, like: Tensor) -> list[Tensor | None]:
    """Gradients for a batch of slopes g [G, 3]. Kernels take one slope, so the gradients of each of the three sums are
    combined."""
    total: list[Tensor | None] = []
    for k in range(3):
        slope = like.new_zeros(like.shape[0], 3)
        slope[:, k] = 1
        found = scaled(under(slope), [g[:, k]] * 4)
        sums = zip(found, total or [None] * 4, strict=True)
        total = [t if t is None or s is None else t + s for t, s in sums]
    return total


def _hsic_formula(*problem: Tensor) -> tuple[Tensor]:
    return (hsic_formulas.value(*problem),)


def hsic(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, backend: str | None = None) -> Tensor:
    """HSIC(x, y), HSIC(x, x) and HSIC(y, y), biased, [G, 3] in fp64; x [G, B, Dx], y [G, B, Dy], bandwidths [G]."""
    problem = (x.contiguous(), y.contiguous(), sx.contiguous(), sy.contiguous())
    name = backend_name(backend)
    if transforms.active():
        run = partial(_grouped, lambda *t: _HSICFunction.apply(*t, name))
        return transforms.apply(_operator(run, _hsic_formula), *problem)[0]
    return _HSICFunction.apply(*problem, name)
