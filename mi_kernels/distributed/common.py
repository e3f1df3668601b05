"""Checks and reductions shared by the distributed losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..losses import common
from ..ops.common.checks import check_choice, check_floats
from ..ops.common.dtypes import accumulate_dtype
from .exchange import Ranks, meet


def met(features: Tensor, name: str, schedule: str, group: Any, dim: int = -2) -> Ranks:
    """Checks the features and returns the number of rows on every rank."""
    check_choice("schedule", schedule, ("gather", "ring"))
    check_floats(name, features)
    if features.dim() < 2:
        raise ValueError(f"{name} must have shape [*, batch, features], got {tuple(features.shape)}")
    return meet(features, dim=dim, group=group, name=name)


def check_pair(name: str, a: Tensor, other: str, b: Tensor) -> None:
    """The checks of the plain losses, except that a rank may have no rows."""
    if all(isinstance(t, Tensor) and t.dim() > 1 and t.shape[-2] == 0 for t in (a, b)):
        a, b = (t.new_zeros(*t.shape[:-2], 1, t.shape[-1]) for t in (a, b))
    common.check_same_shape(name, a, other, b)


def idle(*used: Any) -> Tensor:
    """Returns 0 for a rank without rows, connected to the graph of all inputs. The rank must take part in the
    collectives of the backward pass, and its temperature needs a gradient like that of the other ranks."""
    return sum(t.reshape(-1)[:0].sum().to(accumulate_dtype(t.dtype)) for t in used if isinstance(t, Tensor))  # type: ignore[return-value]


def pair_scores(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """scale <x_i, y_i>, [*, B]."""
    dtype = accumulate_dtype(x.dtype)
    factor = scale[..., None] if isinstance(scale, Tensor) and scale.dim() else scale
    return (x.to(dtype) * y.to(dtype)).sum(-1) * factor


def mean_over_ranks(rows: Tensor, ranks: Ranks) -> Tensor:
    """Weighted sum of losses [*, B]; its mean over the ranks is the mean over the rows of all ranks."""
    return rows.sum() * (ranks.weight / max(1, rows.shape[:-1].numel()))
