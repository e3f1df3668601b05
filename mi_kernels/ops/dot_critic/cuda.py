"""The dot critic on the CUDA C++ kernels of csrc/dot_critic/ (sm_80 and up).

Statistics of rows and columns together cost N = 2 B N D FLOP, gradients 2N per side, 5N in total. (Above 512 features
in 16 bits, or 256 in fp32, scores are recomputed for every further block of features.) Scores are never stored, every
output is written once by its owner, and no value is read on the host. fp32 uses three TF32 products, or one if torch
allows TF32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.precision import tf32_allowed

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tf32(x: Tensor) -> bool:
    """Checks the dtype; returns whether fp32 products may use TF32."""
    if x.dtype not in TYPES:
        raise RuntimeError(f"backend 'cuda' was requested but cannot run dot_critic: it has no kernel for {x.dtype}")
    return x.dtype == torch.float32 and tf32_allowed()


def stats(problem: tuple[Any, ...], stats: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of schema.py. O(splits B + row blocks N) floats of workspace, at most 1 KiB a column."""
    return torch.ops.mi_kernels_cuda.dot_critic_stats(*problem, stats, clip, _tf32(problem[0]))


def grad(problem: tuple[Any, ...], weights: tuple[Any, ...], needs: int) -> tuple[Tensor, ...]:
    """The operator of schema.py; no workspace beyond a vector for the scale."""
    return torch.ops.mi_kernels_cuda.dot_critic_grad(*problem, *weights, needs, _tf32(problem[0]))
