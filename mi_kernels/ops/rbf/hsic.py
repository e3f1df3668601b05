"""HSIC's three sums in row chunks of plain torch: value, gradient by recomputation, and the materialised definition.

With E_ij = expm1(-gamma |x_i - x_j|^2), F likewise for y, and H the centring matrix, H 1 = 0 drops the ones of the
kernels:  tr(K H L H) = tr(E H F H) = sum_ij E_ij F_ij - 2 / B sum_i e_i f_i + sum(e) sum(f) / B^2,  e = E 1, f = F 1.
The sums are fp64, so that their cancellation costs no digits of fp32 kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from . import reference
from .schema import NEED_GAMMA, NEED_GAMMA_Y, NEED_X, NEED_Y


def _chunks(x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for first in range(0, x.shape[1], rows):
        part = slice(first, min(first + rows, x.shape[1]))
        e = (-gx[:, None, None] * reference.squared_distances(x[:, part], x, first)).expm1()
        f = (-gy[:, None, None] * reference.squared_distances(y[:, part], y, first)).expm1()
        yield part, e, f


def combine(products: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """(tr EHFH, tr EHEH, tr FHFH) / B^2, [G, 3], from the sums of products [G, 3] and the row sums [G, B]."""
    batch = e.shape[-1]
    rows = torch.stack([(e * f).sum(-1), (e * e).sum(-1), (f * f).sum(-1)], -1)
    sums = torch.stack([e.sum(-1) * f.sum(-1), e.sum(-1).square(), f.sum(-1).square()], -1)
    return (products - 2 / batch * rows + sums / batch**2) / batch**2


def _products(e: Tensor, f: Tensor) -> Tensor:
    return torch.stack([(a * b).sum((-2, -1), dtype=torch.float64) for a, b in ((e, f), (e, e), (f, f))], -1)


def value(x: Tensor, y: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """[G, 3]; every pair is materialised, differentiable any number of times."""
    (_, e, f), *_ = _chunks(x.to(accumulate_dtype(x.dtype)), y.to(accumulate_dtype(y.dtype)), gx, gy, x.shape[1])
    return combine(_products(e, f), e.sum(-1, dtype=torch.float64), f.sum(-1, dtype=torch.float64))


def forward(x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The operator rbf_hsic of schema.py, `rows` rows of pairs at a time."""
    products, e_rows, f_rows = x.new_zeros((x.shape[0], 3), dtype=torch.float64), [], []
    for _, e, f in _chunks(x.to(accumulate_dtype(x.dtype)), y.to(accumulate_dtype(y.dtype)), gx, gy, rows):
        products = products + _products(e, f)
        e_rows.append(e.sum(-1, dtype=torch.float64))
        f_rows.append(f.sum(-1, dtype=torch.float64))
    return products, torch.stack([torch.cat(e_rows, -1), torch.cat(f_rows, -1)], 1)


def backward(
    x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, row_sums: Tensor, g: Tensor, needs: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator rbf_hsic_grad of schema.py, `rows` rows of pairs at a time."""
    batch = x.shape[1]
    a, b = x.to(accumulate_dtype(x.dtype)), y.to(accumulate_dtype(y.dtype))
    g = (g / batch**2).to(a.dtype)[:, :, None, None]
    found = dx, dy, dgx, dgy = [torch.zeros_like(t) for t in (a, b, gx, gy)]
    means = (row_sums / batch).to(a.dtype).unbind(1)
    for part, e, f in _chunks(a, b, gx, gy, rows):
        he, hf = (
            k - m[:, part, None] - m[:, None] + m.mean(-1)[:, None, None]
            for k, m in zip((e, f), means, strict=True)
        )
        of_e, of_f = g[:, 0] * hf + 2 * g[:, 1] * he, g[:, 0] * he + 2 * g[:, 2] * hf
        _accumulate(a, part, of_e * (e + 1), gx, dx, dgx)
        _accumulate(b, part, of_f * (f + 1), gy, dy, dgy)
    bits = (NEED_X, NEED_Y, NEED_GAMMA, NEED_GAMMA_Y)
    gradients = [
        t.to(like.dtype) if needs & bit else like.new_empty(0)
        for t, like, bit in zip(found, (x, y, gx, gy), bits, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2], gradients[3]


def _accumulate(a: Tensor, part: slice, of_exponent: Tensor, gamma: Tensor, da: Tensor, dgamma: Tensor) -> None:
    """Adds the gradients under dL/d(-gamma r^2) of these rows; the whole matrix is symmetric, so a row's is doubled."""
    distance = reference.squared_distances(a[:, part], a, part.start)
    dgamma -= (of_exponent * distance).sum((-2, -1))
    slope = -4 * gamma[:, None, None] * of_exponent
    da[:, part] += slope.sum(-1, keepdim=True) * a[:, part] - slope @ a
