"""Checks that operators share."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .autograd import batched

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_samples(name: str, t: Tensor) -> None:
    """A tensor [*, batch, features] of a known dtype that is not empty; TypeError or ValueError naming it otherwise."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() < 2 or t.numel() == 0:
        raise ValueError(f"{name} must have shape [*, batch, features] and not be empty, got {tuple(t.shape)}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_tensor(name: str, t: Tensor, *, optional: bool = False) -> None:
    """A tensor of a known floating-point dtype; TypeError or ValueError naming it otherwise."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor{' or None' if optional else ''}, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_integers(name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """A tensor of integers of this shape; `meaning` says the shape in words."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(t).__name__}")
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or t.is_quantized:
        raise ValueError(f"{name} must be of an integer type, got {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, got {list(t.shape)}")


def check_within(name: str, t: Tensor, high: int, meaning: str) -> None:
    """Integers from 0 to `high`. Values on a GPU, in a compiled graph and under vmap are not looked at: that would wait
    for the device, break the graph or raise; kernels clamp them."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or batched(t):
        return
    low, top = (int(x) for x in t.aminmax())
    if low < 0 or top > high:
        raise ValueError(f"{name} must lie between 0 and {meaning} = {high}, got {low} to {top}")


def _is(x: Any, abstract: type, known: Any) -> bool:
    """Whether x is a number of this kind, NumPy's included; torch.compile knows nothing of the abstract classes."""
    if isinstance(x, bool):
        return False
    return isinstance(x, known) or (not torch.compiler.is_compiling() and isinstance(x, abstract))


def is_integer(x: Any) -> bool:
    """Whether x is an integer, symbolic ones and NumPy's included, and no boolean."""
    return _is(x, Integral, int | torch.SymInt)


def check_number(name: str, x: float, low: float, high: float, accepted: str) -> None:
    """A real number with low <= x < high; booleans, strings, tensors and NaN are none. `accepted` says so in words."""
    if not _is(x, Real, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be {accepted}, got {type(x).__name__}")
    if not low <= x < high:
        raise ValueError(f"{name} must be {accepted}, got {x}")


def check_count(name: str, x: int) -> None:
    """A positive integer."""
    if not is_integer(x):
        raise TypeError(f"{name} must be a positive integer, got {type(x).__name__}")
    if x < 1:
        raise ValueError(f"{name} must be a positive integer, got {x}")


def check_memory_budget(memory_budget: int) -> None:
    if not is_integer(memory_budget):
        raise TypeError(f"memory_budget must be a number of bytes, got {type(memory_budget).__name__}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
