"""Sums of a Gaussian kernel over pairs in plain torch (schema.py has the formulas).

`value` materialises all pairs and is differentiable; `value_and_gradients` holds `rows` rows of pairs at a time. Cost:
2 D FLOP per pair for the value and as much again for the gradient of each side; several times that for rows whose
distances are computed from differences (distances.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .distances import Points, apart, kernels, points, pull, squared, units, without_own
from .schema import NEED_BANDWIDTH, NEED_X, NEED_Y


def _sums(distance: Tensor, gamma: Tensor) -> Tensor:
    """sum of e over the pairs, [*], in fp64."""
    return _sum(*kernels(-gamma[..., None, None] * distance[..., None, :, :])).mean(-1)


def _sum(kernel: Tensor, e: Tensor) -> Tensor:
    """sum of e = kernel - 1 over the last two dimensions in fp64: of e of near pairs, and of kernels of far ones less
    their number. A far pair's e is -1 and a rounding as large as its kernel may be."""
    far = kernel < 0.5
    return torch.where(far, kernel, e).sum((-2, -1), dtype=torch.float64) - far.sum((-2, -1), dtype=torch.float64)


def value(x: Tensor, y: Tensor, bandwidth: Tensor, w_xx: float, w_yy: float, w_xy: float) -> Tensor:
    """The operator's value, [*]; x, y [*, n, D], bandwidth [*, K]. Differentiable any number of times."""
    dtype = accumulate_dtype(x.dtype)
    scale, gamma = units(bandwidth.to(dtype))
    x, y = (t.to(dtype) * scale[..., None, None] for t in (x, y))
    found = w_xx * _sums(apart(x, x, own=True), gamma)
    if y.shape[-2]:
        found = found + w_yy * _sums(apart(y, y, own=True), gamma) + w_xy * _sums(apart(x, y), gamma)
    return found


class _Totals:
    """Sums over blocks of pairs: the value, and the gradients of the scaled samples and of gamma."""

    def __init__(self, x: Points, y: Points, gamma: Tensor, rows: int | None):
        self.gamma, self.rows = gamma, rows
        self.value = gamma.new_zeros(gamma.shape[:1], dtype=torch.float64)
        self.dx, self.dy = torch.zeros_like(x.given), torch.zeros_like(y.given)
        self.dgamma = torch.zeros_like(gamma, dtype=torch.float64)

    def add(self, a: Points, b: Points, weight: float, da: Tensor, db: Tensor, same: bool) -> None:
        """Adds weight * sum of e over the pairs of a and b, and its gradients; `same`: b is a."""
        count = a.norms.shape[-1]
        step = count if self.rows is None else max(1, self.rows)
        for first in range(0, count, step):
            part = slice(first, first + step)
            own = a.rows(part)
            distance, direct = squared(own, b, first if same else None)
            slope = torch.zeros_like(distance)
            share = weight / self.gamma.shape[1]
            for k in range(self.gamma.shape[1]):
                g = self.gamma[:, k, None, None]
                kernel, e = kernels(-g * distance)
                self.value += _sum(kernel, e) * share
                self.dgamma[:, k] -= (kernel * distance).sum((-2, -1), dtype=torch.float64) * share
                slope.addcmul_(g.expand_as(kernel), kernel, value=-2 * share)
            if same:
                without_own(slope, first)
            da[:, part] += pull(slope, own, b, direct)
            db += pull(slope.mT, b, own, direct)


def value_and_gradients(
    x: Tensor,
    y: Tensor,
    bandwidth: Tensor,
    w_xx: float,
    w_yy: float,
    w_xy: float,
    needs: int,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator rbf_mmd of schema.py, `rows` rows of pairs at a time."""
    dtype = accumulate_dtype(x.dtype)
    wide = bandwidth.to(dtype)
    scale, gamma = units(wide)
    a, b = points(scale, x.to(dtype), y.to(dtype))
    found = _Totals(a, b, gamma, rows)
    found.add(a, a, w_xx, found.dx, found.dx, True)
    if y.shape[1]:
        found.add(b, b, w_yy, found.dy, found.dy, True)
        found.add(a, b, w_xy, found.dx, found.dy, False)
    return (
        found.value,
        (found.dx * scale[:, None, None]).to(x.dtype) if needs & NEED_X else x.new_empty(0),
        (found.dy * scale[:, None, None]).to(y.dtype) if needs & NEED_Y else y.new_empty(0),
        of_bandwidth(found.dgamma, gamma, wide).to(bandwidth.dtype)
        if needs & NEED_BANDWIDTH
        else bandwidth.new_empty(0),
    )


def of_bandwidth(dgamma: Tensor, gamma: Tensor, bandwidth: Tensor) -> Tensor:
    """Converts the gradient of gamma (for scaled samples) to the gradient of the bandwidth."""
    return -2 * dgamma * gamma / bandwidth
