"""Validation of the dot critic's inputs. Every loss and bound over dot-product scores enters here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import FLOATS
from ..common.dtypes import accumulate_dtype
from . import autograd, dispatch
from .schema import (
    ALL,
    COL_LSE,
    OFF_DIAGONAL,
    ROW_LSE,
    SOFTPLUS,
    UNEQUAL_IDS,
    UNEQUAL_IDS_OR_POSITIVE,
)

PAIRS = {
    "all": ALL,
    "off_diagonal": OFF_DIAGONAL,
    "unequal_ids": UNEQUAL_IDS,
    "unequal_ids_or_positive": UNEQUAL_IDS_OR_POSITIVE,
}
_STATS = {"row_lse": ROW_LSE, "col_lse": COL_LSE, "row_softplus": SOFTPLUS}


class Statistics(NamedTuple):
    """What was asked for; None elsewhere. LSEs in nats, fp32 (fp64 for fp64)."""

    row_lse: Tensor | None  # [*, B]
    col_lse: Tensor | None  # [*, N]
    row_softplus: Tensor | None  # [*, B]


class Prepared(NamedTuple):
    """Inputs in the operators' form, but for x and y, which keep the caller's shape until `autograd.flat`."""

    problem: dispatch.Problem
    shape: torch.Size  # the caller's group dimensions


def _features(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() < 2:
        raise ValueError(f"{name} must have shape [*, batch, features], got {tuple(t.shape)}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
    if 0 in t.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(t.shape)}")


def _vector(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor, ids: bool = False) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, x is on {like.device}")
    if ids and (t.is_floating_point() or t.is_complex()):
        raise ValueError(f"{name} must hold integers, got {t.dtype}")
    try:
        t = t.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}") from None
    t = t.reshape(-1, shape[-1])
    return (t.long() if ids else t.to(accumulate_dtype(like.dtype))).contiguous()


def _scale(scale: Tensor | float, shape: torch.Size, like: Tensor) -> Tensor:
    """[G] in the accumulation type, from a number, a one-element tensor or [*]."""
    wide = accumulate_dtype(like.dtype)
    if not isinstance(scale, Tensor):
        return torch.full((shape.numel(),), float(scale), dtype=wide, device=like.device)
    if scale.device != like.device and scale.dim():
        raise ValueError(f"scale is on {scale.device}, x is on {like.device}")
    if scale.numel() != 1 and scale.shape != shape:
        raise ValueError(f"scale must be a number, a 0-d tensor or have shape {tuple(shape)}, got {tuple(scale.shape)}")
    flat = scale.reshape(-1).to(like.device, wide)
    return flat.expand(shape.numel()).contiguous()


def prepare(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    pairs: str = "all",
    positive_shift: int = -1,
) -> Prepared:
    """Checks the inputs and brings them to the operators' form. Raises ValueError or TypeError naming the argument."""
    _features("x", x)
    _features("y", y)
    if x.dtype != y.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x and y must have one dtype, got {x.dtype} and {y.dtype}")
        short = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(short), y.to(short)
    if x.device != y.device:
        raise ValueError(f"y is on {y.device}, x is on {x.device}")
    if x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must agree in all but the batch dimension")
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    if pairs.startswith("unequal") and (row_ids is None or col_ids is None):
        raise ValueError(f"pairs={pairs!r} needs row_ids and col_ids")
    if positive_shift >= 0 and (
        pairs == "unequal_ids" or (pairs == "off_diagonal" and positive_shift % y.shape[-2] == 0)
    ):
        raise ValueError(f"positive_shift={positive_shift} names pairs that pairs={pairs!r} leaves out")
    if x is y:
        y = x.view_as(x)  # a function that is compiled takes a tensor once
    shape, rows, columns = x.shape[:-2], x.shape[:-1], y.shape[:-1]
    problem = (
        x,
        y,
        _scale(scale, shape, x),
        None if row_bias is None else _vector("row_bias", row_bias, rows, x),
        None if col_bias is None else _vector("col_bias", col_bias, columns, x),
        None if row_ids is None else _vector("row_ids", row_ids, rows, x, ids=True),
        None if col_ids is None else _vector("col_ids", col_ids, columns, x, ids=True),
        PAIRS[pairs],
        positive_shift,
    )
    return Prepared(problem, shape)


def _clipped(problem: dispatch.Problem, bits: int, clip: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    with torch.no_grad():
        return torch.ops.mi_kernels.dot_critic_stats(*autograd.flat(problem), bits, float(clip), backend)


def statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float = 1.0,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    pairs: str = "all",
    stats: tuple[str, ...] = ("row_lse",),
    clip: float | None = None,
    backend: str | None = None,
) -> Statistics:
    """Statistics of S = scale x y^T + row_bias + col_bias that is never stored.

    x [*, B, D], y [*, N, D]; scale a float, a 0-d tensor or [*]; biases [*, B] and [*, N]; ids integers of the same
    shapes. `pairs`: "all", "off_diagonal" (i != j) or "unequal_ids". `stats`: any of "row_lse" [*, B], "col_lse"
    [*, N], "row_softplus" [*, B] (sum_j softplus S_ij). A row without pairs has LSE -inf. Differentiable twice in x,
    y, scale and the biases. `clip` clamps the scores that enter the LSEs to [-clip, clip]; the statistics then carry no
    gradient. Cost: 2 B N D FLOP forward, 6 B N D backward, O((B + N) D) memory.
    Raises ValueError or TypeError that names the argument, RuntimeError if a backend that was named cannot run.
    """
    unknown = set(stats) - set(_STATS)
    if unknown or not stats:
        raise ValueError(f"stats must name some of {', '.join(_STATS)}, got {stats!r}")
    prepared = prepare(x, y, scale, row_bias=row_bias, col_bias=col_bias, row_ids=row_ids, col_ids=col_ids, pairs=pairs)
    bits = sum(_STATS[name] for name in set(stats))
    if clip is None:
        found = autograd.Statistics.apply(*prepared.problem, bits, backend or "")
    else:
        found = _clipped(prepared.problem, bits, clip, backend or "")
    return Statistics(
        *(t.reshape(*prepared.shape, -1) if bits & bit else None for t, bit in zip(found, _STATS.values(), strict=True))
    )


def loss(
    prepared: Prepared,
    *,
    w_row: float = 0.0,
    w_col: float = 0.0,
    w_soft: float = 0.0,
    w_pos: float = 0.0,
    soft_signed: bool = False,
    normalize: bool = False,
    memory_budget: int = 0,
    backend: str | None = None,
) -> Tensor:
    """w_row sum_i row_lse_i + w_col sum_j col_lse_j + w_soft sum_ij softplus(S_ij) - w_pos sum_i S_i,pos(i), [*].

    `normalize` brings the rows of x and y to unit length first. Gradients are computed with the value when an input
    requires them and autograd records: 3N one-sided, 4N with both LSEs (3N where `memory_budget` bytes hold the
    scores), N = 2 B N D FLOP; without, N.
    """
    settings = (w_row, w_col, w_soft, w_pos, soft_signed, normalize, memory_budget, backend or "")
    if not torch.is_grad_enabled():
        return autograd.loss_value(prepared.problem, settings)
    return autograd.Loss.apply(*prepared.problem, settings)


def row_losses(
    prepared: Prepared, *, symmetric: bool = False, normalize: bool = False, backend: str | None = None
) -> Tensor:
    """row_lse_i - S_i,pos(i) for every row, [*, B]; symmetric averages it with the positive column's. `normalize` as in
    `loss`. 4N FLOP: the gradients have to wait for what every row counts, and form the scores again; 3N on a CPU where
    16 MiB hold them."""
    settings = (symmetric, normalize, backend or "")
    if not torch.is_grad_enabled():
        return autograd.row_losses_value(prepared.problem, settings)
    return autograd.RowLosses.apply(*prepared.problem, settings)
