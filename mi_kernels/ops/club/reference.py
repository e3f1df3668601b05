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
    v = c.square().mean(-2, keepdim=True)
    terms = v - c.square() + 2 * m * c
    if logvar is not None:
        terms = terms * _precision(logvar, terms)
    return terms.sum(-1).mean(-1) / 2


def forward(mu: Tensor, logvar: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    high, low, m, c = _centred(mu, y)
    w = _precision(logvar, c)
    v = c.square().mean(-2, keepdim=True)
    found = (w * (v - c.square() + 2 * m * c)).sum(-1).mean(-1) / 2
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
