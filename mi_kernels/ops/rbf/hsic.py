"""HSIC's three sums in plain torch: in chunks of rows (value, and gradient by recomputation), and the materialised
definition.

Let E_ij = expm1(-gamma |x_i - x_j|^2), F likewise for y, and H the centring matrix. Because H 1 = 0, the ones of the
kernels drop out:  tr(K H L H) = tr(E H F H) = sum_ij E_ij F_ij - 2 / B sum_i e_i f_i + sum(e) sum(f) / B^2,  e = E 1, f
= F 1. The sums are fp64, so that their cancellation does not cost precision of fp32 kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .distances import Points, apart, kernels, points, pull, squared, units, without_own
from .reference import of_bandwidth
from .schema import NEED_BANDWIDTH, NEED_BANDWIDTH_Y, NEED_X, NEED_Y


def combine(products: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """(tr EHFH, tr EHEH, tr FHFH) / B^2, [*, 3], from the sums of products [*, 3] and the row sums [*, B]."""
    batch = e.shape[-1]
    rows = torch.stack([(e * f).sum(-1), (e * e).sum(-1), (f * f).sum(-1)], -1)
    sums = torch.stack([e.sum(-1) * f.sum(-1), e.sum(-1).square(), f.sum(-1).square()], -1)
    return (products - 2 / batch * rows + sums / batch**2) / batch**2


def _products(e: Tensor, f: Tensor) -> Tensor:
    return torch.stack([(a * b).sum((-2, -1), dtype=torch.float64) for a, b in ((e, f), (e, e), (f, f))], -1)


def value(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor) -> Tensor:
    """The three sums, [*, 3], with materialised pairs; differentiable any number of times."""

    def kernel(t: Tensor, bandwidth: Tensor) -> Tensor:
        dtype = accumulate_dtype(t.dtype)
        scale, gamma = units(bandwidth.to(dtype)[..., None])
        t = t.to(dtype) * scale[..., None, None]
        return kernels(-gamma[..., None] * apart(t, t, own=True))[1]

    e, f = kernel(x, sx), kernel(y, sy)
    return combine(_products(e, f), e.sum(-1, dtype=torch.float64), f.sum(-1, dtype=torch.float64))


class _Side:
    """One of the two samples in units of its bandwidth, and its gradients."""

    def __init__(self, t: Tensor, bandwidth: Tensor):
        dtype = accumulate_dtype(t.dtype)
        self.bandwidth = bandwidth.to(dtype)
        self.scale, gamma = units(self.bandwidth[:, None])
        self.gamma = gamma[:, 0]
        (self.points,) = points(self.scale, t.to(dtype))
        self.gradient = torch.zeros_like(self.points.given)
        self.dgamma = torch.zeros_like(self.gamma, dtype=torch.float64)

    def tile(self, part: slice) -> tuple[Points, Tensor, Tensor, Tensor, bool]:
        """These rows, their distances from all rows, the kernel, e, and whether the distances came from differences."""
        own = self.points.rows(part)
        distance, direct = squared(own, self.points, part.start)
        return own, distance, *kernels(-self.gamma[:, None, None] * distance), direct

    def add(self, part: slice, of_exponent: Tensor, own: Points, distance: Tensor, direct: bool) -> None:
        """Adds the gradients for dL/d(-gamma r^2) of these rows. The matrix is symmetric, so the gradient of a row is
        doubled."""
        self.dgamma -= (of_exponent * distance).sum((-2, -1), dtype=torch.float64)
        slope = without_own(-4 * self.gamma[:, None, None] * of_exponent, part.start)
        self.gradient[:, part] += pull(slope, own, self.points, direct)


def _parts(batch: int, rows: int) -> Iterator[slice]:
    for first in range(0, batch, rows):
        yield slice(first, min(first + rows, batch))


def forward(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The operator rbf_hsic of schema.py, `rows` rows of pairs at a time."""
    of_x, of_y = _Side(x, sx), _Side(y, sy)
    products, e_rows, f_rows = x.new_zeros((x.shape[0], 3), dtype=torch.float64), [], []
    for part in _parts(x.shape[1], rows):
        e, f = of_x.tile(part)[3], of_y.tile(part)[3]
        products = products + _products(e, f)
        e_rows.append(e.sum(-1, dtype=torch.float64))
        f_rows.append(f.sum(-1, dtype=torch.float64))
    return products, torch.stack([torch.cat(e_rows, -1), torch.cat(f_rows, -1)], 1)


def backward(
    x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, row_sums: Tensor, g: Tensor, needs: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator rbf_hsic_grad of schema.py, `rows` rows of pairs at a time."""
    batch, sides = x.shape[1], (_Side(x, sx), _Side(y, sy))
    dtype = sides[0].scale.dtype
    g = (g / batch**2).to(dtype)[:, :, None, None]
    means = (row_sums / batch).to(dtype).unbind(1)
    for part in _parts(batch, rows):
        (own_x, r_x, k_x, e, direct_x), (own_y, r_y, k_y, f, direct_y) = (side.tile(part) for side in sides)
        he, hf = (
            t - m[:, part, None] - m[:, None] + m.mean(-1)[:, None, None]
            for t, m in zip((e, f), means, strict=True)
        )
        of_e, of_f = g[:, 0] * hf + 2 * g[:, 1] * he, g[:, 0] * he + 2 * g[:, 2] * hf
        sides[0].add(part, of_e * k_x, own_x, r_x, direct_x)
        sides[1].add(part, of_f * k_y, own_y, r_y, direct_y)
    found = [side.gradient.mul_(side.scale[:, None, None]) for side in sides]
    found += [of_bandwidth(side.dgamma, side.gamma, side.bandwidth) for side in sides]
    bits = (NEED_X, NEED_Y, NEED_BANDWIDTH, NEED_BANDWIDTH_Y)
    gradients = [
        t.to(like.dtype) if needs & bit else like.new_empty(0)
        for t, like, bit in zip(found, (x, y, sx, sy), bits, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2], gradients[3]
