"""Runs the operators of the CLUB bound on a backend. Kernels are imported on first use."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import resolve
from ..common.precision import outside_autocast
from . import reference
from .schema import library


@outside_autocast
def forward(mu: Tensor, logvar: Tensor | None, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    name = resolve("club", mu.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.club_forward(mu, logvar, y)
    if name == "triton":
        from . import triton

        return triton.forward(mu, logvar, y)
    return reference.forward(mu, logvar, y)


@outside_autocast
def backward(
    mu: Tensor, logvar: Tensor | None, y: Tensor, moments: Tensor, g: Tensor, needs: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    name = resolve("club", mu.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.club_backward(mu, logvar, y, moments, g, needs)
    if name == "triton":
        from . import triton

        return triton.backward(mu, logvar, y, moments, g, needs)
    return reference.backward(mu, logvar, y, moments, g, needs)


for _key in ("CPU", "CUDA"):
    library.impl("club_forward", forward, _key)
    library.impl("club_backward", backward, _key)
