"""Operators for sums of Gaussian kernels over pairs: schemas, definitions and shape functions. Imports only torch.

    e(a, b) = mean_k expm1(-|a - b|^2 / (2 s_k^2))
    rbf_mmd -> value [G] = w_xx sum_ij e(x_i, x_j) + w_yy sum_ij e(y_i, y_j) + w_xy sum_ij e(x_i, y_j), in fp64,
               and the gradients of x, y and the bandwidth for an incoming gradient of 1, in the same call.

x [G, B, D], y [G, N, D] (N may be 0), bandwidth s [G, K]. The definition uses expm1 instead of exp, because the ones
cancel in a squared MMD. Near 0 the result then has the precision of e instead of the rounding errors of the ones.

    rbf_hsic      -> sums over pairs of e f, e e and f f [G, 3] and row sums of e and f [G, 2, B], all fp64,
                     e_ij = expm1(-|x_i - x_j|^2 / (2 sx^2)), f_ij = expm1(-|y_i - y_j|^2 / (2 sy^2))
    rbf_hsic_grad -> gradients of x, y, sx and sy for g [G, 3], the gradient of (tr EHFH, tr EHEH, tr FHFH) / B^2, H = 1
    - 11'/B;
                     `rows` are the row sums.

x [G, B, Dx], y [G, B, Dy], sx and sy [G].
Samples may have any mean and unit. Internally they are centred and in units of the smallest bandwidth; gamma is 1 / (2
s^2) in these units. Distances of pairs that are too near for inner products are computed from differences
(distances.py). Bits of `needs` select the gradients to compute; the others are empty. `backend` "" is the automatic
choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEED_X, NEED_Y, NEED_BANDWIDTH, NEED_BANDWIDTH_Y = 1, 2, 4, 8

library = torch.library.Library("mi_kernels", "FRAGMENT")
library.define(
    "rbf_mmd(Tensor x, Tensor y, Tensor bandwidth, float w_xx, float w_yy, float w_xy, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define("rbf_hsic(Tensor x, Tensor y, Tensor sx, Tensor sy, str backend) -> (Tensor, Tensor)")
library.define(
    "rbf_hsic_grad(Tensor x, Tensor y, Tensor sx, Tensor sy, Tensor rows, Tensor g, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mi_kernels::rbf_mmd", lib=library)
def _(x: Tensor, y: Tensor, bandwidth: Any, w_xx: float, w_yy: float, w_xy: float, needs: int, backend: str) -> Any:
    return (
        x.new_empty((x.shape[0],), dtype=torch.float64),
        x.new_empty(x.shape if needs & NEED_X else (0,)),
        y.new_empty(y.shape if needs & NEED_Y else (0,)),
        bandwidth.new_empty(bandwidth.shape if needs & NEED_BANDWIDTH else (0,)),
    )


@torch.library.register_fake("mi_kernels::rbf_hsic", lib=library)
def _(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, backend: str) -> Any:
    groups, batch = x.shape[:2]
    return x.new_empty((groups, 3), dtype=torch.float64), x.new_empty((groups, 2, batch), dtype=torch.float64)


@torch.library.register_fake("mi_kernels::rbf_hsic_grad", lib=library)
def _(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, rows: Tensor, g: Any, needs: int, backend: str) -> Any:
    return (
        x.new_empty(x.shape if needs & NEED_X else (0,)),
        y.new_empty(y.shape if needs & NEED_Y else (0,)),
        sx.new_empty(sx.shape if needs & NEED_BANDWIDTH else (0,)),
        sy.new_empty(sy.shape if needs & NEED_BANDWIDTH_Y else (0,)),
    )
