"""Runs the operators for sums of Gaussian kernels on a backend. Kernels are imported on first use."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import resolve
from ..common.precision import outside_autocast
from . import hsic, reference
from .schema import library

CHUNK_BYTES = 32 << 20


def chunk_rows(groups: int, columns: int) -> int:
    """The number of rows of pairs that fit the chunk buffer."""
    return max(1, CHUNK_BYTES // (8 * groups * max(columns, 1)))


@outside_autocast
def mmd(
    x: Tensor, y: Tensor, bandwidth: Tensor, w_xx: float, w_yy: float, w_xy: float, needs: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = resolve("rbf_mmd", x.device, backend or None)
    problem = (x, y, bandwidth, w_xx, w_yy, w_xy, needs)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.rbf_mmd(*problem)
    if name == "triton":
        from . import triton_mmd

        return triton_mmd.mmd(*problem)
    rows = None if name == "reference" else chunk_rows(x.shape[0], max(x.shape[1], y.shape[1]))
    return reference.value_and_gradients(*problem, rows=rows)


def _hsic_rows(x: Tensor, name: str) -> int:
    return x.shape[1] if name == "reference" else chunk_rows(x.shape[0], 4 * x.shape[1])


@outside_autocast
def hsic_forward(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    name = resolve("rbf_hsic", x.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.rbf_hsic(x, y, sx, sy)
    if name == "triton":
        from . import triton_hsic

        return triton_hsic.forward(x, y, sx, sy)
    return hsic.forward(x, y, sx, sy, _hsic_rows(x, name))


@outside_autocast
def hsic_backward(
    x: Tensor, y: Tensor, sx: Tensor, sy: Tensor, rows: Tensor, g: Tensor, needs: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = resolve("rbf_hsic", x.device, backend or None)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.rbf_hsic_grad(x, y, sx, sy, rows, g, needs)
    if name == "triton":
        from . import triton_hsic

        return triton_hsic.backward(x, y, sx, sy, rows, g, needs)
    return hsic.backward(x, y, sx, sy, rows, g, needs, _hsic_rows(x, name))


for _key in ("CPU", "CUDA"):
    library.impl("rbf_mmd", mmd, _key)
    library.impl("rbf_hsic", hsic_forward, _key)
    library.impl("rbf_hsic_grad", hsic_backward, _key)
