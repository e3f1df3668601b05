"""Autograd of the sums of a Gaussian kernel over pairs. Callers validate."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .schema import NEED_GAMMA, NEED_X, NEED_Y


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
