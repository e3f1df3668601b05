"""The dot critic on the CUDA C++ kernels of csrc/dot_critic/ (sm_80 and up).

Statistics take N = 2 B D N FLOPs for rows and columns together, gradients 2N a side (D up to 512 in 16 bits, 256 in
fp32; beyond it scores are recomputed for every further block of features): 5N in all. Scores are never stored, every
output is written once by its owner, no value goes to the host. fp32 runs as 3xTF32, or as TF32 where torch allows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.precision import tf32_allowed

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tf32(x: Tensor) -> bool:
    """Checks the type; whether fp32 products may be rounded to TF32."""
    if x.dtype not in TYPES:
        raise RuntimeError(f"backend 'cuda' was requested but cannot run dot_critic: it has no kernel for {x.dtype}")
    return x.dtype == torch.float32 and tf32_allowed()


def stats(problem: tuple[Any, ...], stats: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of schema.py. O(splits B + row blocks N) floats of workspace, at most 1 KiB a column."""
    return torch.ops.mi_kernels_cuda.dot_critic_stats(*problem, stats, clip, _tf32(problem[0]))


def grad(problem: tuple[Any, ...], weights: tuple[Any, ...], needs: int) -> tuple[Tensor, ...]:
    """The operator of schema.py; no workspace beyond a vector for the scale."""
    return torch.ops.mi_kernels_cuda.dot_critic_grad(*problem, *weights, needs, _tf32(problem[0]))
