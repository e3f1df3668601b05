"""Operator for sums of a Gaussian kernel over pairs: schema, meaning and shape function. Imports torch alone.

    e(a, b) = mean_k expm1(-gamma_k |a - b|^2)
    rbf_mmd -> value [G] = w_xx sum_ij e(x_i, x_j) + w_yy sum_ij e(y_i, y_j) + w_xy sum_ij e(x_i, y_j), in fp64,
               and the gradients of x, y and gamma of a unit slope, in the same call.

x [G, B, D], y [G, N, D] (N may be 0), gamma [G, K]. expm1 instead of exp because the ones cancel in a squared MMD: what
is left near its null is of the size of the e, not of rounding errors of the ones. The caller centres x and y.
Bits of `needs` say which gradients are wanted; the others come back empty. `backend` "" is the automatic choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEED_X, NEED_Y, NEED_GAMMA = 1, 2, 4

library = torch.library.Library("mi_kernels", "FRAGMENT")
library.define(
    "rbf_mmd(Tensor x, Tensor y, Tensor gamma, float w_xx, float w_yy, float w_xy, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def wide(t: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything shorter."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mi_kernels::rbf_mmd", lib=library)
def _(x, y, gamma, w_xx, w_yy, w_xy, needs, backend):
    return (
        x.new_empty((x.shape[0],), dtype=torch.float64),
        x.new_empty(x.shape if needs & NEED_X else (0,)),
        y.new_empty(y.shape if needs & NEED_Y else (0,)),
        gamma.new_empty(gamma.shape if needs & NEED_GAMMA else (0,)),
    )
