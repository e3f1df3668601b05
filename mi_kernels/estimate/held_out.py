"""The value of a fitted objective on given samples, with its sampling error."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

GROUPS = 10  # number of groups of the jackknife


class Value(NamedTuple):
    mean: float
    sampling_error: float
    candidates: int  # number of samples per block


def _blocks(n: int, block: int) -> list[slice]:
    """Splits n samples into the fewest equal blocks of at most `block`; up to count - 1 samples at the end are left
    out."""
    count = math.ceil(n / block)
    size = n // count
    return [slice(k * size, (k + 1) * size) for k in range(count)]


def _mean(objective: nn.Module, x: Tensor, y: Tensor, block: int) -> float:
    values = [objective(x[b], y[b]).double() for b in _blocks(x.shape[0], block)]
    return torch.stack(values).mean().item()


@torch.no_grad()
def evaluate(objective: nn.Module, x: Tensor, y: Tensor, block: int, *, error: bool = True) -> Value:
    """The mean value over blocks of at most `block` samples.

    If the objective has `contributions` of single samples, their spread gives the sampling error (InfoNCE: the
    first-order terms of its Hájek projection at a calibrated critic). Otherwise a jackknife over groups of samples
    does, which also works for values that are not means over samples. Costs 1 or 1 + GROUPS evaluations.
    """
    objective.eval()
    n, size = x.shape[0], _blocks(x.shape[0], block)[0].stop
    if hasattr(objective, "contributions"):
        parts = torch.cat([objective.contributions(x[b], y[b]) for b in _blocks(n, block)]).double()  # type: ignore[operator]
        return Value(parts.mean().item(), (parts.std() / math.sqrt(parts.numel())).item(), size)
    mean = _mean(objective, x, y, block)
    if not error:
        return Value(mean, math.nan, size)
    group = torch.arange(n, device=x.device) % GROUPS
    without = torch.tensor([_mean(objective, x[group != g], y[group != g], block) for g in range(GROUPS)])
    spread = (without - without.mean()).square().sum().item()
    return Value(mean, math.sqrt((GROUPS - 1) / GROUPS * spread), size)
