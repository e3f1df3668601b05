"""Autograd of the sums of Gaussian kernels over pairs. Callers validate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import autograd as handover
from . import dispatch, reference
from . import hsic as hsic_formulas
from .schema import NEED_GAMMA, NEED_GAMMA_Y, NEED_X, NEED_Y


class _MMDFunction(torch.autograd.Function):
    # The gradients of a unit slope come with the value: the pairs are formed once, not again in the backward pass.
    @staticmethod
    def forward(ctx, x, y, gamma, *settings):
        needs = handover.needs(ctx.needs_input_grad, (NEED_X, NEED_Y, NEED_GAMMA))
        found, gradients = _mmd_and_gradients(x, y, gamma, settings, needs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x, y, gamma, *gradients)
        else:  # handed over in backward; computed again for whoever goes back a second time
            ctx.save_for_backward(x, y, gamma)
            ctx.gradients = gradients
        ctx.settings, ctx.needs = settings, needs
        return found

    @staticmethod
    def backward(ctx, g):
        x, y, gamma, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [t for t in (x, y, gamma) if t.requires_grad]
            found = reference.value(*reference.centred(x, y), gamma, *ctx.settings[:3])
            again = iter(torch.autograd.grad(found, inputs, g, create_graph=True, allow_unused=True))
            return *(next(again) if t.requires_grad else None for t in (x, y, gamma)), *(None,) * 4
        slope = g.to(gamma.dtype)
        if kept:
            return *handover.scaled(kept, slope), *(None,) * 4
        gradients = ctx.gradients or _mmd_and_gradients(x, y, gamma, ctx.settings, ctx.needs)[1]
        ctx.gradients = None
        return *handover.times(gradients, slope), *(None,) * 4


def _mmd_and_gradients(
    x: Tensor, y: Tensor, gamma: Tensor, settings: tuple[Any, ...], needs: int
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    w_xx, w_yy, w_xy, backend = settings
    run = torch.ops.mi_kernels.rbf_mmd if torch.compiler.is_compiling() else dispatch.mmd
    # Centred here, where autograd does not record it: pairs see differences alone, so the gradients are the same.
    a, b = reference.centred(x, y)
    found, *gradients = run(a, b, gamma, w_xx, w_yy, w_xy, needs, backend)
    bits = (NEED_X, NEED_Y, NEED_GAMMA)
    return found, tuple(t if needs & bit else None for t, bit in zip(gradients, bits, strict=True))


def mmd(
    x: Tensor, y: Tensor, gamma: Tensor, w_xx: float, w_yy: float, w_xy: float, backend: str | None = None
) -> Tensor:
    """The weighted kernel sums of schema.py, [G] in fp64. x [G, B, D], y [G, N, D], gamma [G, K]."""
    problem = (x, y, gamma.contiguous())
    settings = (w_xx, w_yy, w_xy, backend or "")
    if not torch.is_grad_enabled():  # the function would be told of gradients all the same, and compute them
        return _mmd_and_gradients(*problem, settings, 0)[0]
    return _MMDFunction.apply(*problem, *settings)


class _HSICFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gx, gy, backend):
        run = torch.ops.mi_kernels.rbf_hsic if torch.compiler.is_compiling() else dispatch.hsic_forward
        products, rows = run(x, y, gx, gy, backend)
        ctx.save_for_backward(x, y, gx, gy, rows)
        ctx.backend = backend
        return hsic_formulas.combine(products, *rows.unbind(1))

    @staticmethod
    def backward(ctx, g):
        x, y, gx, gy, rows = ctx.saved_tensors
        problem = (x, y, gx, gy)
        if torch.is_grad_enabled():
            inputs = [t for t in problem if t.requires_grad]
            again = iter(torch.autograd.grad(hsic_formulas.value(*problem), inputs, g, create_graph=True))
            return *(next(again) if t.requires_grad else None for t in problem), None
        bits = (NEED_X, NEED_Y, NEED_GAMMA, NEED_GAMMA_Y)
        needs = handover.needs(ctx.needs_input_grad, bits)
        run = torch.ops.mi_kernels.rbf_hsic_grad if torch.compiler.is_compiling() else dispatch.hsic_backward
        gradients = run(*problem, rows, g.contiguous(), needs, ctx.backend)
        return *(t if needs & bit else None for t, bit in zip(gradients, bits, strict=True)), None


def hsic(x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, backend: str | None = None) -> Tensor:
    """HSIC(x, y), HSIC(x, x) and HSIC(y, y), biased, [G, 3] in fp64; x [G, B, Dx], y [G, B, Dy], gamma [G]."""
    return _HSICFunction.apply(x.contiguous(), y.contiguous(), gx.contiguous(), gy.contiguous(), backend or "")
