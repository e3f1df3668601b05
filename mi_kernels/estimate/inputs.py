"""Checks the arguments of `estimate_mi` and splits the samples. Every error message names the argument."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bounds import registry
from ..critics import Critic
from . import screening

LEAST_SAMPLES = 50
LARGEST_SEED = 2**63 - 1


class Samples(NamedTuple):
    x: Tensor  # [N, Dx] float64
    y: Tensor
    rows: Tensor  # [N], row numbers in the given arrays
    notes: list[str]


class Split(NamedTuple):
    train: Tensor
    validation: Tensor
    held_out: Tensor


def _tensor(name: str, value: Any) -> Tensor:
    """Converts to a dense tensor of real numbers; lists and arrays become float64."""
    if isinstance(value, Tensor):
        return _dense(name, value)
    if isinstance(value, (list, tuple)):
        try:
            return torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{name} must be nested lists of real numbers: {error}") from None
    if not hasattr(value, "__array__"):
        raise ValueError(f"{name} must be an array, a tensor or nested lists of numbers, got {type(value).__name__}")
    import numpy as np  # objects with __array__ come from a library that depends on NumPy

    if np.ma.is_masked(value):
        raise ValueError(f"{name} must not be masked: leave the masked rows out")
    array = np.asarray(value)
    # bool, signed, unsigned, float
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return torch.from_numpy(array.astype("float64"))


def _dense(name: str, value: Tensor) -> Tensor:
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        raise ValueError(f"{name} must be a dense tensor with values, got layout {value.layout} on {value.device}")
    if value.is_complex():
        raise ValueError(f"{name} must hold real numbers, got dtype {value.dtype}")
    tensor: Tensor = value.detach()
    return tensor


def _side(name: str, value: Any, device: torch.device | None) -> tuple[Tensor, list[str]]:
    tensor = _tensor(name, value)
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(-1)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D] or [N], got {tuple(tensor.shape)}")
    if tensor.shape[0] < LEAST_SAMPLES:
        raise ValueError(f"{name} must hold at least {LEAST_SAMPLES} samples, got {tensor.shape[0]}")
    tensor = tensor.to(device=device or tensor.device, dtype=torch.float64)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite entries")
    varying = (tensor != tensor[:1]).any(0)
    if not varying.any():
        raise ValueError(f"{name} must not be constant, got {tuple(tensor[0, :3].tolist())} at the start of every row")
    constant = int((~varying).sum())
    tensor = _moderate(tensor[:, varying])
    return tensor, [f"{name}: {constant} constant columns were left out"] if constant else []


def _moderate(v: Tensor) -> Tensor:
    """Scales columns by powers of two to values near 1. This rounds nothing and prevents overflow of later squares."""
    _, exponents = torch.frexp(v.abs().amax(0))
    # In two steps, because 2 ** 1074 is infinite.
    first = exponents // 2
    for part in (first, exponents - first):
        v = v * torch.tensor([2.0**-e for e in part.tolist()], dtype=v.dtype, device=v.device)
    return v


def check_device(device: Any) -> torch.device | None:
    """Returns the device, or None. Raises ValueError unless the device is present and supports float64."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        usable = torch.zeros(1, dtype=torch.float64, device=found).isfinite().all().item()
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise ValueError(f"device must be present on this machine and support float64, got {device!r}")
    return found


def check_samples(x: Any, y: Any, device: Any) -> Samples:
    """x and y as float64 [N, D] without constant columns and duplicated rows. Raises ValueError that names the
    argument."""
    where = check_device(device)
    x, x_notes = _side("x", x, where)
    y, y_notes = _side("y", y, where or x.device)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y must have as many samples as x, {x.shape[0]}, got {y.shape[0]}")
    rows, notes = screening.without_copies(x, y)
    x, y = x[rows], y[rows]
    return Samples(x, y, rows, [*x_notes, *y_notes, *notes, *screening.follows(x, y)])


def _check_integer(name: str, value: Any, least: int, most: int = LARGEST_SEED) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_settings(
    *,
    estimator: Any,
    critic: Any,
    critics: tuple[str, ...],
    max_steps: Any,
    batch_size: Any,
    seed: Any,
    held_out: Any,
    learning_rate: Any,
    progress: Any,
) -> None:
    """Checks all arguments of `estimate_mi` except samples and device. Raises ValueError that names the argument."""
    if not isinstance(estimator, str) or estimator not in registry.estimators():
        raise ValueError(f"estimator must be one of {', '.join(registry.estimators())}, got {estimator!r}")
    if not isinstance(critic, Critic) and not (isinstance(critic, str) and critic in critics):
        raise ValueError(f"critic must be a Critic or one of {', '.join(critics)}, got {critic!r}")
    _check_integer("max_steps", max_steps, 1)
    _check_integer("batch_size", batch_size, 2)
    _check_integer("seed", seed, 0)
    if not _is_number(held_out) or not 0.1 <= held_out <= 0.9:
        raise ValueError(f"held_out must be a fraction in [0.1, 0.9], got {held_out!r}")
    if learning_rate is not None and not (_is_number(learning_rate) and 0 < learning_rate < float("inf")):
        raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
    if not isinstance(progress, bool):
        raise ValueError(f"progress must be True or False, got {progress!r}")


def split(n: int, held_out: float, generator: torch.Generator) -> Split:
    """A random split: a fraction is held out, and a fifth of the rest is for validation."""
    order = torch.randperm(n, generator=generator)
    outside = round(n * held_out)
    inside = n - outside
    validating = max(2, inside // 5)
    return Split(order[validating:inside], order[:validating], order[inside:])
