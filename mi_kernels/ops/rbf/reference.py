"""Sums of a Gaussian kernel over pairs in plain torch (schema.py has the formulas).

`value` materialises every pair and is differentiable; `value_and_gradients` holds `rows` rows of pairs at a time.
Cost 2 pairs D FLOP for the value, as much again for each side's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .schema import NEED_GAMMA, NEED_X, NEED_Y


def centred(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The samples about their common mean: no distance changes, and |a|^2 + |b|^2 - 2 a.b cancels less."""
    y = x[:, :0] if y is None else y
    total = x.detach().sum(-2, keepdim=True) + y.detach().sum(-2, keepdim=True)
    centre = total / (x.shape[-2] + y.shape[-2])
    return x - centre, y - centre


def squared_distances(a: Tensor, b: Tensor, first: int | None = None) -> Tensor:
    """|a_i - b_j|^2, [G, rows, N]; exactly 0 where it is within rounding of it, so that equal rows are.
    `first` says that a is rows first, first + 1, ... of b: those pairs are 0 too."""
    norms = a.square().sum(-1)[..., None] + b.square().sum(-1)[..., None, :]
    distance = norms - 2 * (a @ b.mT)
    distance = torch.where(distance <= 4 * torch.finfo(a.dtype).eps * norms, 0, distance)  # a NaN stays one
    if first is None:
        return distance
    own = torch.arange(a.shape[-2], device=a.device)
    same = torch.zeros(distance.shape[-2:], dtype=torch.bool, device=a.device)
    same[own, own + first] = True
    return distance.masked_fill(same, 0)


def _sums(distance: Tensor, gamma: Tensor) -> Tensor:
    """sum of e over the pairs, [G], in fp64."""
    exponents = (-gamma[:, :, None, None] * distance[:, None]).expm1()
    return exponents.sum((-2, -1), dtype=torch.float64).mean(-1)


def value(x: Tensor, y: Tensor, gamma: Tensor, w_xx: float, w_yy: float, w_xy: float) -> Tensor:
    x, y, gamma = x.to(accumulate_dtype(x.dtype)), y.to(accumulate_dtype(y.dtype)), gamma.to(accumulate_dtype(x.dtype))
    terms = [w_xx * _sums(squared_distances(x, x, 0), gamma)]
    if y.shape[1]:
        terms.append(w_yy * _sums(squared_distances(y, y, 0), gamma))
        terms.append(w_xy * _sums(squared_distances(x, y), gamma))
    return sum(terms[1:], terms[0])


def _block(a: Tensor, b: Tensor, gamma: Tensor, weight: float, rows: int | None, same: bool, out: list[Tensor]) -> None:
    """Adds weight * sum of e to out[0] and its gradients to out[1] (a), out[2] (b) and out[3] (gamma)."""
    step = a.shape[1] if rows is None else max(1, rows)
    for first in range(0, a.shape[1], step):
        part = a[:, first : first + step]
        distance = squared_distances(part, b, first if same else None)
        slope = torch.zeros_like(distance)
        for k in range(gamma.shape[1]):
            g = gamma[:, k, None, None]
            e = (-g * distance).expm1_()
            out[0] += e.sum((-2, -1), dtype=torch.float64) * (weight / gamma.shape[1])
            kernel = e.add_(1)
            out[3][:, k] -= (kernel * distance).sum((-2, -1)) * (weight / gamma.shape[1])
            slope.addcmul_(g.expand_as(kernel), kernel, value=-2 * weight / gamma.shape[1])
        out[1][:, first : first + step] += slope.sum(-1, keepdim=True) * part - slope @ b
        out[2] += slope.sum(-2).unsqueeze(-1) * b - slope.mT @ part


def value_and_gradients(
    x: Tensor,
    y: Tensor,
    gamma: Tensor,
    w_xx: float,
    w_yy: float,
    w_xy: float,
    needs: int,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    a, b, gamma_wide = x.to(dtype), y.to(dtype), gamma.to(dtype)
    found = x.new_zeros((x.shape[0],), dtype=torch.float64)
    dx, dy, dgamma = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(gamma_wide)
    _block(a, a, gamma_wide, w_xx, rows, True, [found, dx, dx, dgamma])
    if y.shape[1]:
        _block(b, b, gamma_wide, w_yy, rows, True, [found, dy, dy, dgamma])
        _block(a, b, gamma_wide, w_xy, rows, False, [found, dx, dy, dgamma])
    return (
        found,
        dx.to(x.dtype) if needs & NEED_X else x.new_empty(0),
        dy.to(y.dtype) if needs & NEED_Y else y.new_empty(0),
        dgamma.to(gamma.dtype) if needs & NEED_GAMMA else gamma.new_empty(0),
    )
