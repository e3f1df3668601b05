"""Checks of `estimate_mi`'s arguments, and the split of its samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_SAMPLES = 50


class Samples(NamedTuple):
    x: Tensor  # [N, Dx] float64
    y: Tensor
    notes: list[str]


class Split(NamedTuple):
    train: Tensor
    validation: Tensor
    held_out: Tensor


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        dtype = getattr(value, "dtype", None)
        # numpy kinds: bool, signed, unsigned, float
        if dtype is not None and getattr(dtype, "kind", "f") not in "biuf":
            raise ValueError(f"{name} must hold real numbers, got dtype {dtype}")
        try:
            value = torch.as_tensor(value if dtype is None else value.astype("float64"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be an array or tensor of real numbers: {error}") from None
    if value.is_complex():
        raise ValueError(f"{name} must hold real numbers, got dtype {value.dtype}")
    tensor: Tensor = value.detach()
    return tensor


def _side(name: str, value: Any, device: torch.device | str | None) -> tuple[Tensor, list[str]]:
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
        raise ValueError(f"{name} must not be constant, got {tuple(tensor[0, :3].tolist())} ... in every sample")
    constant = int((~varying).sum())
    return tensor[:, varying], [f"{name}: {constant} constant columns were left out"] if constant else []


def check_samples(x: Any, y: Any, device: torch.device | str | None) -> Samples:
    """Both sides as float64 [N, D] without constant columns. Raises ValueError that names the argument."""
    x, x_notes = _side("x", x, device)
    y, y_notes = _side("y", y, device or x.device)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y must have as many samples as x, {x.shape[0]}, got {y.shape[0]}")
    return Samples(x, y, x_notes + y_notes)


def check_settings(max_steps: int, batch_size: int, held_out: float, learning_rate: float | None) -> None:
    for name, value, least in (("max_steps", max_steps, 1), ("batch_size", batch_size, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not 0.1 <= held_out <= 0.9:
        raise ValueError(f"held_out must be a fraction in [0.1, 0.9], got {held_out}")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")


def split(n: int, held_out: float, generator: torch.Generator) -> Split:
    """A random part is held out; of the rest a fifth validates."""
    order = torch.randperm(n, generator=generator)
    outside = round(n * held_out)
    inside = n - outside
    validating = max(2, inside // 5)
    return Split(order[validating:inside], order[:validating], order[inside:])
