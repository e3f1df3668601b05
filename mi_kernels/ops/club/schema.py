"""Operators of the Gaussian CLUB bound: schemas, definitions and shape functions. Imports only torch.

With c_i = y_i - ybar, m_i = mu_i - ybar, w_i = exp(-logvar_i) and v = mean_i c_i^2, all per dimension,

    value = mean_i log N(y_i; mu_i, exp logvar_i) - mean_ij log N(y_j; mu_i, exp logvar_i)
          = 1 / (2 B) sum_i sum_d w_i (v - c_i^2 + 2 m_i c_i)

because mean_j (y_j - mu_i)^2 = v + m_i^2. This is exact and costs O(B D), without forming pairs.

mu, y [*, B, D]; logvar [*, B, D] or None (unit variance); contiguous.
club_forward  -> value [*] and moments [*, 5, D]: ybar as a rounded value and its remainder, v, mean w, mean w m.
club_backward -> gradients of mu, logvar and y for the incoming gradient g [*]:
    dmu_i = g / B w_i c_i,   dlogvar_i = -g / (2 B) w_i (v - c_i^2 + 2 m_i c_i),
    dy_i  = g / B (mean(w) c_i - mean(w m) - w_i (c_i - m_i)).
Bits of `needs` select the gradients to compute; the others are empty. `backend` "" is the automatic choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype

NEED_MU, NEED_LOGVAR, NEED_Y = 1, 2, 4
MOMENTS = 5

library = torch.library.Library("mi_kernels", "FRAGMENT")
library.define("club_forward(Tensor mu, Tensor? logvar, Tensor y, str backend) -> (Tensor, Tensor)")
library.define(
    "club_backward(Tensor mu, Tensor? logvar, Tensor y, Tensor moments, Tensor g, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mi_kernels::club_forward", lib=library)
def _(mu: Tensor, logvar: Tensor | None, y: Tensor, backend: str) -> Any:
    *groups, _, depth = mu.shape
    dtype = accumulate_dtype(mu.dtype)
    return mu.new_empty(groups, dtype=dtype), mu.new_empty((*groups, MOMENTS, depth), dtype=dtype)


@torch.library.register_fake("mi_kernels::club_backward", lib=library)
def _(mu: Tensor, logvar: Tensor | None, y: Tensor, moments: Any, g: Any, needs: int, backend: str) -> Any:
    return tuple(mu.new_empty(mu.shape if needs & bit else (0,)) for bit in (NEED_MU, NEED_LOGVAR, NEED_Y))
