"""Runs the operator for sums of a Gaussian kernel on a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import requested_backend, resolve
from . import reference
from .schema import library

CHUNK_BYTES = 32 << 20


def chunk_rows(groups: int, columns: int) -> int:
    """Rows of pairs that fit the chunk buffer."""
    return max(1, CHUNK_BYTES // (8 * groups * max(columns, 1)))


def mmd(
    x: Tensor, y: Tensor, gamma: Tensor, w_xx: float, w_yy: float, w_xy: float, needs: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = resolve("rbf_mmd", x.device, backend or None)
    if name == "triton" and (backend or requested_backend()) == "triton":
        raise RuntimeError("backend 'triton' was asked for and cannot run rbf_mmd: it has no Triton kernel")
    problem = (x, y, gamma, w_xx, w_yy, w_xy, needs)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.rbf_mmd(*problem)
    rows = None if name == "reference" else chunk_rows(x.shape[0], max(x.shape[1], y.shape[1]))
    return reference.value_and_gradients(*problem, rows=rows)


for _key in ("CPU", "CUDA"):
    library.impl("rbf_mmd", mmd, _key)
