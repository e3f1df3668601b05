"""Validators that operators, losses and bounds share: one sentence on the argument, what it is, what it may be."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .autograd import batched

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, t: Any) -> None:
    """TypeError unless t is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def check_samples(name: str, t: Any) -> None:
    """A tensor [*, batch, features] of a known dtype that is not empty; TypeError or ValueError naming it otherwise."""
    check_tensor(name, t)
    if t.dim() < 2 or t.numel() == 0:
        raise ValueError(f"{name} must have shape [*, batch, features] and not be empty, got {tuple(t.shape)}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_number(name: str, value: Any, *, positive: bool = False, infinite: bool = False) -> None:
    """A finite real number (symbolic ones of torch.compile included), above 0 if `positive`; math.inf too if
    `infinite`."""
    if type(value) is not float:
        symbolic = isinstance(value, torch.SymFloat | torch.SymInt)
        if isinstance(value, bool) or not (symbolic or isinstance(value, Real)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if infinite and value == math.inf:
        return
    if not -math.inf < value < math.inf or (positive and not value > 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {value}")


def check_integer(name: str, value: Any, least: int = 0) -> None:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def backend_name(backend: Any) -> str:
    """The operators' form of a `backend` argument: "" for None, the automatic choice."""
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise ValueError(f"backend must be the name of a backend or None, got {backend!r}")
    return backend


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """One of the names that are accepted."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def positive_values(name: str, t: Tensor) -> None:
    """ValueError unless every entry of t is positive and finite. Looks at CPU tensors alone: GPUs would stall."""
    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"{name} must be real, got {t.dtype}")
    if t.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(t.shape)}")
    if t.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return
    low, high = (float(bound) for bound in t.detach().aminmax())
    if not (low > 0 and high < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {t.detach().tolist()}")


def check_floats(name: str, t: Any) -> None:
    """A tensor of a known floating-point dtype."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_lengths(name: str, t: Any, shape: tuple[int, ...], meaning: str, most: int, longest: str) -> None:
    """Integers from 0 to `most`, of this shape; `meaning` and `longest` say both in words.

    Values on a GPU, in a compiled graph and under vmap are not looked at: that would wait for the device, break the
    graph or raise. Kernels clamp them.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(t).__name__}")
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"{name} must be of an integer type, got {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, got {list(t.shape)}")
    if t.device.type != "cpu" or torch.compiler.is_compiling() or batched(t):
        return
    low, high = (int(x) for x in t.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{name} must lie between 0 and {longest} = {most}, got {low} to {high}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """A real number with low <= value < high; NaN is none."""
    check_number(name, value)
    if not low <= value < high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}), got {value}")
