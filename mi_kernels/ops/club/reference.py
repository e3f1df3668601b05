"""The Gaussian CLUB bound in plain torch (schema.py has the formulas). O(B D) FLOP; about ten B x D temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .schema import NEED_LOGVAR, NEED_MU, NEED_Y


def _centred(mu: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ybar in two parts (a rounded mean and its remainder), m and c. The rounded mean is subtracted first and the
    remainder second: with y around 1e4, a single rounded mean would give an error of 1e-3."""
    mu, y = mu.to(accumulate_dtype(mu.dtype)), y.to(accumulate_dtype(y.dtype))
    high = y.mean(-2, keepdim=True)
    c = y - high
    low = c.mean(-2, keepdim=True)
    return high, low, mu - high - low, c - low


def _precision(logvar: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if logvar is None else (-logvar.to(like.dtype)).exp()


def value(mu: Tensor, logvar: Tensor | None, y: Tensor) -> Tensor:
    """The bound, [*], of inputs [*, B, D]; differentiable any number of times."""
    *_, m, c = _centred(mu, y)
    return _terms(m, c, None if logvar is None else _precision(logvar, c)).sum(-1).mean(-1) / 2


def _terms(m: Tensor, c: Tensor, w: Tensor | None) -> Tensor:
    """What the value is half the mean of. Equal precisions: sum_i (v - c_i^2) = 0 is left out, for its rounding would
    drown a small value."""
    if w is None:
        return 2 * m * c
    return w * (c.square().mean(-2, keepdim=True) - c.square() + 2 * m * c)


def forward(mu: Tensor, logvar: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    high, low, m, c = _centred(mu, y)
    w = _precision(logvar, c)
    v = c.square().mean(-2, keepdim=True)
    found = _terms(m, c, None if logvar is None else w).sum(-1).mean(-1) / 2
    moments = torch.cat([high, low, v, w.mean(-2, keepdim=True), (w * m).mean(-2, keepdim=True)], -2)
    return found, moments


def backward(
    mu: Tensor, logvar: Tensor | None, y: Tensor, moments: Tensor, g: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    high, low, v, w_mean, wm_mean = moments.unsqueeze(-2).unbind(-3)
    m, c = (t.to(moments.dtype) - high - low for t in (mu, y))
    w = _precision(logvar, c)
    scale = g.to(c.dtype)[..., None, None] / mu.shape[-2]
    empty = mu.new_empty(0)
    return (
        (scale * w * c).to(mu.dtype) if needs & NEED_MU else empty,
        (scale * w * (v - c.square() + 2 * m * c) / -2).to(mu.dtype) if needs & NEED_LOGVAR else empty.clone(),
        (scale * (w_mean * c - wm_mean - w * (c - m))).to(mu.dtype) if needs & NEED_Y else empty.clone(),
    )
