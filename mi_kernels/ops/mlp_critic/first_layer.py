"""The first layer of a concat critic, applied to x and y apart: W [x_i, y_j] + b = u_i + v_j.

Autograd would give the gradient of each half of W in a zeroed matrix of W's size and add the two; here the halves are
computed alone and joined once. At small batches that traffic was a tenth of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apart(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """u [*, B, H] and v [*, N, H] of x [*, B, Dx], y [*, N, Dy], weight [H, Dx + Dy] and bias [H]; a weight [G, H,
    Dx + Dy] and bias [G, H] belong to x [G, B, Dx]. Differentiable any number of times. Cost: 2 H (B Dx + N Dy) FLOP
    forward, twice that backward."""
    u, v = _Apart.apply(x, y, weight, bias)
    return u, v


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y, weight)
        w_x, w_y = weight[..., : x.shape[-1]], weight[..., x.shape[-1] :]
        return x @ w_x.mT, (y @ w_y.mT).add_(bias.unsqueeze(-2))

    @staticmethod
    def backward(ctx: Any, g_u: Tensor, g_v: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        w_x, w_y = weight[..., : x.shape[-1]], weight[..., x.shape[-1] :]
        need_x, need_y, need_weight, need_bias = ctx.needs_input_grad
        return (
            g_u @ w_x if need_x else None,
            g_v @ w_y if need_y else None,
            torch.cat([_products(g_u, x, weight), _products(g_v, y, weight)], -1) if need_weight else None,
            g_v.reshape(*weight.shape[:-2], -1, weight.shape[-2]).sum(-2) if need_bias else None,
        )


def _products(g: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    """sum_i g_i t_i^T, over the leading dimensions as well where the weight is shared."""
    if weight.dim() == 2:
        g, t = g.flatten(0, -2), t.flatten(0, -2)
    return g.mT @ t
