"""The first layer of a concat critic, applied to x and y separately: W [x_i, y_j] + b = u_i + v_j.

For 16-bit inputs u and v are fp32. The gradient of a critic is a small difference between pairs, so rounding u and v to
16 bits before adding them would give up to ten times the error of rounding their sum once.

Ordinary autograd would create a zero matrix of the size of W for the gradient of each half and add the two. Here the
two halves are computed separately and concatenated, which saves a tenth of a step at small batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.dtypes import accumulate_dtype
from ..common.precision import outside_autocast


def apart(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """u [*, B, H] and v [*, N, H] for x [*, B, Dx], y [*, N, Dy], weight [H, Dx + Dy] and bias [H], in fp32 (fp64 for
    fp64).

    With groups, weight is [G, H, Dx + Dy], bias [G, H] and x [G, B, Dx]. Differentiable any number of times; gradients
    are summed in fp32 and rounded once. Cost: 2 H (B Dx + N Dy) FLOP forward, twice that backward.
    """
    if transforms.active():
        return _halves(x, y, weight, bias)
    u, v = _Apart.apply(x, y, weight, bias)
    return u, v


@outside_autocast
def _halves(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.to(accumulate_dtype(x.dtype))
    u, v = x.to(wide.dtype) @ wide[..., : x.shape[-1]].mT, y.to(wide.dtype) @ wide[..., x.shape[-1] :].mT
    return u, v + bias.to(wide.dtype).unsqueeze(-2)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y, weight)
        return _halves(x, y, weight, bias)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, g_u: Tensor, g_v: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        need_x, need_y, need_weight, need_bias = ctx.needs_input_grad
        wide = weight.to(g_u.dtype)
        halves = (_products(g_u, x, weight), _products(g_v, y, weight)) if need_weight else ()
        return (
            (g_u @ wide[..., : x.shape[-1]]).to(x.dtype) if need_x else None,
            (g_v @ wide[..., x.shape[-1] :]).to(x.dtype) if need_y else None,
            torch.cat(halves, -1).to(weight.dtype) if need_weight else None,
            g_v.reshape(*weight.shape[:-2], -1, weight.shape[-2]).sum(-2).to(weight.dtype) if need_bias else None,
        )


def _products(g: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    """sum_i g_i t_i^T, summed over the leading dimensions too if the weight is shared."""
    if weight.dim() == 2:
        g, t = g.flatten(0, -2), t.flatten(0, -2)
    return g.mT @ t.to(g.dtype)
