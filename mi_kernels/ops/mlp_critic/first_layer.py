"""The first layer of a concat critic, applied to x and y apart: W [x_i, y_j] + b = u_i + v_j.

u and v are in fp32 for 16-bit inputs. Every pair's first layer is the sum of one u and one v, and a critic's gradient
is a small difference between pairs: two halves rounded to 16 bits before they are added cost up to ten times the error
of a layer that rounds its sum once.

Autograd would give the gradient of each half of W in a zeroed matrix of W's size and add the two; here the halves are
computed alone and joined once. At small batches that traffic was a tenth of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.dtypes import accumulate_dtype
from ..common.precision import outside_autocast


def apart(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """u [*, B, H] and v [*, N, H] of x [*, B, Dx], y [*, N, Dy], weight [H, Dx + Dy] and bias [H], in fp32 (fp64 for
    fp64).

    A weight [G, H, Dx + Dy] and bias [G, H] belong to x [G, B, Dx]. Differentiable any number of times; gradients are
    summed in fp32 and narrowed once. Cost: 2 H (B Dx + N Dy) FLOP forward, twice that backward.
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
    """sum_i g_i t_i^T, over the leading dimensions as well where the weight is shared."""
    if weight.dim() == 2:
        g, t = g.flatten(0, -2), t.flatten(0, -2)
    return g.mT @ t.to(g.dtype)
