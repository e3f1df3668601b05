"""Checks that operators share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_samples(name: str, t: Tensor) -> None:
    """A tensor [*, batch, features] of a known dtype that is not empty; TypeError or ValueError naming it otherwise."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() < 2 or t.numel() == 0:
        raise ValueError(f"{name} must have shape [*, batch, features] and not be empty, got {tuple(t.shape)}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
