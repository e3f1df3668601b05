"""Which precision sums and results are in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32
