"""Validators that operators, losses and bounds share: one sentence on the argument, what it is, what it may be."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

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
