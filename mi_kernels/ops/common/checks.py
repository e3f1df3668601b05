"""Argument checks for operators, losses and bounds. Messages name the argument, its value and what is accepted."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...backends import NAMES
from .autograd import readable
from .precision import autocast_on

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_INTEGER = 2**63 - 1
LIMITS = {dtype: torch.finfo(dtype).max for dtype in FLOATS}


def check_tensor(name: str, t: Any) -> None:
    """Raises TypeError unless t is a tensor, and ValueError unless it is dense."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got layout {t.layout}{' (nested)' if t.is_nested else ''}")


def check_same_device(name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Raises ValueError unless t is on the device of `like`, whose name is `other`."""
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {other}, {like.device}, got {t.device}")


def check_one_dtype(name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Raises ValueError unless t has the dtype of `like`, whose name is `other`. Under autocast any dtypes are
    accepted."""
    if t.dtype != like.dtype and not autocast_on(like.device.type):
        raise ValueError(f"{other} and {name} must have one dtype, got {like.dtype} and {t.dtype}")


def check_bool(**values: Any) -> None:
    """Raises TypeError unless every value is True or False. The truth value of other types, such as "no", would
    surprise."""
    for name, value in values.items():
        if value is not True and value is not False:
            raise TypeError(f"{name} must be True or False, got {value!r:.80}")


def check_samples(name: str, t: Any) -> None:
    """Raises TypeError or ValueError unless t is a non-empty tensor [*, batch, features] of a supported dtype."""
    check_tensor(name, t)
    if t.dim() < 2 or t.numel() == 0:
        raise ValueError(f"{name} must have shape [*, batch, features] and not be empty, got {tuple(t.shape)}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_number(
    name: str, value: Any, *, positive: bool = False, infinite: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Raises TypeError or ValueError unless value is a finite real number (including symbolic numbers of
    torch.compile), positive if `positive`, and finite in `dtype` if given. `infinite` also allows math.inf."""
    if type(value) is not float:
        symbolic = isinstance(value, (torch.SymFloat, torch.SymInt))
        if isinstance(value, bool) or not (symbolic or isinstance(value, Real)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if infinite and value == math.inf:
        return
    limit = LIMITS[dtype or torch.float64]
    if not -limit <= value <= limit or (positive and not value > 0):
        where = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite{where}, got {_brief(value)}")


def check_temperature(name: str, value: Any, dtype: torch.dtype = torch.float64) -> None:
    """Raises TypeError or ValueError unless value is a positive number whose inverse is finite in `dtype`."""
    check_number(name, value, positive=True)
    least = 1.0 / LIMITS[dtype]
    if not value >= least:
        held = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be at least {least:.3g}, so that its inverse is finite in {held}, got {value}")


def _brief(value: Any) -> str:
    """Formats a number for a message; a huge integer is described by its size."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def check_integer(name: str, value: Any, least: int = 0, most: float = MOST_INTEGER) -> None:
    """Raises TypeError or ValueError unless value is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {_brief(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {_brief(value)}")


def backend_name(backend: Any) -> str:
    """Converts a `backend` argument to the operators' form: "" for None (the automatic choice). "" is left
    unchanged."""
    if backend is None:
        return ""
    if not isinstance(backend, str) or (backend and backend not in NAMES):
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {backend!r:.80}")
    return backend


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of the accepted names."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def positive_values(name: str, t: Tensor, least: float = 0.0) -> None:
    """Raises ValueError unless every entry of t is positive, finite and at least `least`. Checks only CPU tensors,
    because reading a GPU tensor would stall the GPU."""
    check_tensor(name, t)
    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"{name} must be real, got {t.dtype}")
    if t.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(t.shape)}")
    if not readable(t):
        return
    low, high = (float(bound) for bound in t.detach().aminmax())
    if not (low > 0 and low >= least and high < math.inf):
        bound = f"at least {least:.3g}" if low > 0 and high < math.inf else "positive"
        raise ValueError(f"{name} must be {bound} and finite, got {t.detach().tolist()}")


def check_floats(name: str, t: Any) -> None:
    """Raises TypeError or ValueError unless t is a tensor of a supported floating-point dtype."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_lengths(name: str, t: Any, shape: tuple[int, ...], meaning: str, most: int, longest: str) -> None:
    """Raises TypeError or ValueError unless t holds integers from 0 to `most` and has this shape; `meaning` and
    `longest` describe shape and limit in messages.

    Values on a GPU, in a compiled graph and under vmap are not read, because this would synchronise, break the graph or
    raise. Kernels clamp them.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(t).__name__}")
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"{name} must be of an integer type, got {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, got {list(t.shape)}")
    if not readable(t):
        return
    low, high = (int(x) for x in t.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{name} must lie between 0 and {longest} = {most}, got {low} to {high}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """A real number with low <= value < high; NaN is none."""
    check_number(name, value)
    if not low <= value < high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}), got {value}")
