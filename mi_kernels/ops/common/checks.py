"""Checks that operators share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Number, Real

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


def is_number(value: object) -> bool:
    """A real number of Python's or NumPy's, or the symbol of one under torch.compile; True and False are none."""
    return isinstance(value, Real | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def described(value: object) -> str:
    """What an error says was given."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"{value!r}" if isinstance(value, str | Number | None) else f"a {type(value).__name__}"


def check_positive(name: str, value: object, accepted: str = "a positive number") -> None:
    """A positive, finite number; TypeError or ValueError naming it otherwise. Works on symbolic numbers."""
    if not is_number(value):
        raise TypeError(f"{name} must be {accepted}, got {described(value)}")
    if not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_width(name: str, value: object) -> None:
    """A number of features or units: an integer of at least 1; TypeError or ValueError naming it otherwise."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least 1, got {described(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of the strings; ValueError naming it otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {described(value)}")
