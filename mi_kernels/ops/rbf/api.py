"""Autograd of the sums of Gaussian kernels over pairs. Callers validate."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from . import hsic as hsic_formulas
from .schema import NEED_GAMMA, NEED_GAMMA_Y, NEED_X, NEED_Y


class _MMDFunction(torch.autograd.Function):
    # The gradients of a unit slope come with the value: the pairs are formed once, not again in the backward pass.
    @staticmethod
    def forward(ctx, x, y, gamma, w_xx, w_yy, w_xy, backend):
        bits = (NEED_X, NEED_Y, NEED_GAMMA)
        needs = sum(bit for bit, wanted in zip(bits, ctx.needs_input_grad, strict=False) if wanted)
        run = torch.ops.mi_kernels.rbf_mmd if torch.compiler.is_compiling() else dispatch.mmd
        # Centred here, where autograd does not record it: pairs see differences alone, so the gradients are the same.
        a, b = reference.centred(x, y)
        found, *gradients = run(a, b, gamma, w_xx, w_yy, w_xy, needs, backend)
        ctx.save_for_backward(x, y, gamma, *gradients)
        ctx.settings = (w_xx, w_yy, w_xy, needs)
        return found

    @staticmethod
    def backward(ctx, g):
        x, y, gamma, *gradients = ctx.saved_tensors
        *weights, needs = ctx.settings
        if torch.is_grad_enabled():
            inputs = [t for t in (x, y, gamma) if t.requires_grad]
            a, b = reference.centred(x, y)
            found = reference.value(a, b, gamma, *weights)
            again = iter(torch.autograd.grad(found, inputs, g, create_graph=True, allow_unused=True))
            return *(next(again) if t.requires_grad else None for t in (x, y, gamma)), *(None,) * 4
        slope = g.to(gamma.dtype)
        scaled = []
        for t, bit in zip(gradients, (NEED_X, NEED_Y, NEED_GAMMA), strict=True):
            of_group = slope.view(-1, *(1,) * (t.dim() - 1)) if needs & bit else None
            scaled.append(None if of_group is None else (t * of_group).to(t.dtype))
        return *scaled, *(None,) * 4


def mmd(
    x: Tensor, y: Tensor, gamma: Tensor, w_xx: float, w_yy: float, w_xy: float, backend: str | None = None
) -> Tensor:
    """The weighted kernel sums of schema.py, [G] in fp64. x [G, B, D], y [G, N, D], gamma [G, K]."""
    return _MMDFunction.apply(x, y, gamma.contiguous(), w_xx, w_yy, w_xy, backend or "")


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
        needs = sum(bit for bit, wanted in zip(bits, ctx.needs_input_grad, strict=False) if wanted)
        run = torch.ops.mi_kernels.rbf_hsic_grad if torch.compiler.is_compiling() else dispatch.hsic_backward
        gradients = run(*problem, rows, g.contiguous(), needs, ctx.backend)
        return *(t if needs & bit else None for t, bit in zip(gradients, bits, strict=True)), None


def hsic(x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, backend: str | None = None) -> Tensor:
    """HSIC(x, y), HSIC(x, x) and HSIC(y, y), biased, [G, 3] in fp64; x [G, B, Dx], y [G, B, Dy], gamma [G]."""
    return _HSICFunction.apply(x.contiguous(), y.contiguous(), gx.contiguous(), gy.contiguous(), backend or "")
