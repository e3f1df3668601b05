"""Runs the operators of the CLUB bound on a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import requested_backend, resolve
from . import reference
from .schema import library


def _compiled(device: torch.device, backend: str) -> bool:
    name = resolve("club", device, backend or None)
    if name == "triton" and (backend or requested_backend()) == "triton":
        raise RuntimeError("backend 'triton' was asked for and cannot run club: it has no Triton kernel")
    return name == "cpu"


def forward(mu: Tensor, logvar: Tensor | None, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if _compiled(mu.device, backend):
        return torch.ops.mi_kernels_cpu.club_forward(mu, logvar, y)
    return reference.forward(mu, logvar, y)


def backward(
    mu: Tensor, logvar: Tensor | None, y: Tensor, moments: Tensor, g: Tensor, needs: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if _compiled(mu.device, backend):
        return torch.ops.mi_kernels_cpu.club_backward(mu, logvar, y, moments, g, needs)
    return reference.backward(mu, logvar, y, moments, g, needs)


for _key in ("CPU", "CUDA"):
    library.impl("club_forward", forward, _key)
    library.impl("club_backward", backward, _key)
