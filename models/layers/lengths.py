"""Sequences padded on the right: which steps are padding, and where a sequence ends.

Every layer passes its inputs through ``sequence`` first: what lies beyond a length, NaN included, is replaced by zeros
there, so that it reaches neither the output nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.batch import Inputs


def sequence(name: str, x: Inputs | Tensor, dim: int | None = None) -> Inputs:
    """Values [B, T, dim], zero beyond the lengths, and the lengths [B] on the values' device.

    A length of 0 is a sequence that is missing: it comes out as a single step of zeros, so that every layer takes it.
    The lengths are None when no step is padding. Their values are not looked at on an accelerator, which would have to
    be waited for, nor in a compiled graph, which would break.
    """
    values, lengths = (x.values, x.lengths) if isinstance(x, Inputs) else (x, None)
    if not isinstance(values, Tensor) or values.dim() != 3 or values.shape[1] == 0:
        raise ValueError(f"{name} must have values [batch, steps, features] with a step, got {_described(values)}")
    if not values.is_floating_point():
        raise ValueError(f"{name} must have values of a floating type, got {values.dtype}")
    if dim is not None and values.shape[2] != dim:
        raise ValueError(f"{name} must have {dim} features per step, got {values.shape[2]}")
    lengths = checked_lengths(name, lengths, values)
    if lengths is None:
        return Inputs(values)
    return Inputs(values.masked_fill(~steps_within(lengths, values.shape[1])[..., None], 0), lengths.clamp(min=1))


def checked_lengths(name: str, lengths: Tensor | None, values: Tensor) -> Tensor | None:
    """``lengths`` as int64 on the device of values [B, T, ...], or None when all of them are known to be T."""
    if lengths is None:
        return None
    batch, steps = values.shape[:2]
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths of {name} must be {batch} integers, got {_described(lengths)} of {lengths.dtype}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
            raise ValueError(f"lengths of {name} must lie between 0 and {steps}, got {lengths.tolist()}")
        if bool((lengths == steps).all()):
            return None
    return lengths.to(values.device, torch.int64)


def same_steps(names: tuple[str, ...], inputs: list[Inputs]) -> Tensor | None:
    """The lengths that aligned sequences share; ValueError where they differ in steps or lengths."""
    first = inputs[0]
    for name, other in zip(names[1:], inputs[1:], strict=True):
        if other.values.shape[:2] != first.values.shape[:2]:
            raise ValueError(
                f"{name} must be aligned with {names[0]}, [batch, steps] {tuple(first.values.shape[:2])}, "
                f"got {tuple(other.values.shape[:2])}"
            )
        if (first.lengths is None) != (other.lengths is None) or (
            first.lengths is not None
            and other.lengths is not None
            and first.lengths.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not torch.equal(first.lengths, other.lengths)
        ):
            raise ValueError(f"{name} must have the lengths of {names[0]}: aligned sequences end together")
    return first.lengths


def steps_within(lengths: Tensor, steps: int) -> Tensor:
    """Boolean [B, steps]: True within each length."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def last_step(states: Tensor, lengths: Tensor | None) -> Tensor:
    """States [B, T, H] at the last step of each sequence, [B, H]."""
    if lengths is None:
        return states[:, -1]
    index = (lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, index).squeeze(1)


def mean_over_steps(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean over the steps within each length, [B, T, D] -> [B, D]; values beyond them must be zero."""
    if lengths is None:
        return values.mean(1)
    return values.sum(1) / lengths[:, None].to(values.dtype)


def _described(x: object) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
