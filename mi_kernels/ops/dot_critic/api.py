"""Argument checks and entry points of the dot-product critic. All losses and bounds on dot-product scores call them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import transforms
from ..common.checks import backend_name, check_choice, check_number, check_samples, check_tensor
from ..common.dtypes import accumulate_dtype
from ..common.precision import autocast_on
from ..common.statistics import Statistics
from . import autograd, dispatch  # noqa: F401  (dispatch registers the operators)
from .problem import LossSettings, Problem, RowSettings, Weights, flat
from .schema import ALL, COL_LSE, OFF_DIAGONAL, ROW_LSE, SOFTPLUS, UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE

PAIRS = {
    "all": ALL,
    "off_diagonal": OFF_DIAGONAL,
    "unequal_ids": UNEQUAL_IDS,
    "unequal_ids_or_positive": UNEQUAL_IDS_OR_POSITIVE,
}
_STATS = {"row_lse": ROW_LSE, "col_lse": COL_LSE, "row_softplus": SOFTPLUS}


class Prepared(NamedTuple):
    """A checked problem in the form of the operators. x and y keep the caller's shape until `problem.flat`."""

    problem: Problem
    shape: torch.Size  # the caller's group dimensions
    tiles: torch.dtype | None = None


def _vector(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor, ids: bool = False) -> Tensor:
    check_tensor(name, t)
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, x is on {like.device}")
    if ids and (t.is_floating_point() or t.is_complex()):
        raise ValueError(f"{name} must hold integers, got {t.dtype}")
    if not ids and not t.is_floating_point():
        raise ValueError(f"{name} must hold floats, got {t.dtype}")
    try:
        t = t.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}") from None
    t = t.reshape(-1, shape[-1])
    return (t.long() if ids else t.to(accumulate_dtype(like.dtype))).contiguous()


def _scale(name: str, scale: Tensor | float, shape: torch.Size, like: Tensor) -> Tensor:
    """Converts the scale (a number, a one-element tensor or [*]) to [G] in the accumulation type."""
    dtype = accumulate_dtype(like.dtype)
    if not isinstance(scale, Tensor):
        check_number(name, scale, dtype=dtype)
        scale = float(scale) if type(scale) is int else scale  # symbolic numbers are left unchanged
        return torch.full((shape.numel(),), scale, dtype=dtype, device=like.device)
    check_tensor(name, scale)
    if scale.is_complex():
        raise ValueError(f"{name} must be real, got {scale.dtype}")
    if scale.device != like.device and (scale.dim() or scale.is_meta):
        raise ValueError(f"{name} is on {scale.device}, x is on {like.device}")
    if scale.numel() != 1 and scale.shape != shape:
        raise ValueError(
            f"{name} must be a number, a 0-d tensor or have shape {tuple(shape)}, got {tuple(scale.shape)}"
        )
    return scale.reshape(-1).to(like.device, dtype).expand(shape.numel()).contiguous()


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
    tiles: torch.dtype | None = None,
    names: tuple[str, ...] = ("x", "y", "scale", "row_ids", "col_ids"),
) -> Prepared:
    """Checks the inputs and converts them to the form of the operators. Raises ValueError or TypeError that names the
    argument.

    tiles: the dtype of the products, if x and y were converted from it. (`critics` and the supervised losses convert
        their features once, so that all gradients are added in fp32 before they are rounded.)
    names: the caller's names of x, y, scale, row_ids and col_ids, for messages.
    """
    check_samples(names[0], x)
    check_samples(names[1], y)
    if x.dtype != y.dtype:
        if not autocast_on(x.device.type):
            raise ValueError(f"{names[0]} and {names[1]} must have one dtype, got {x.dtype} and {y.dtype}")
        short = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(short), y.to(short)
    if x.device != y.device:
        raise ValueError(f"{names[1]} is on {y.device}, {names[0]} is on {x.device}")
    size, other = x.shape, y.shape
    if size != other and (size[-1] != other[-1] or size[:-2] != other[:-2]):
        raise ValueError(
            f"{names[0]} {tuple(x.shape)} and {names[1]} {tuple(y.shape)} must agree in all but the batch dimension"
        )
    check_choice("pairs", pairs, tuple(PAIRS))
    if pairs.startswith("unequal") and (row_ids is None or col_ids is None):
        raise ValueError(f"pairs={pairs!r} needs row_ids and col_ids")
    if positive_shift >= 0 and (
        pairs == "unequal_ids" or (pairs == "off_diagonal" and positive_shift % y.shape[-2] == 0)
    ):
        raise ValueError(f"positive_shift={positive_shift} selects pairs that pairs={pairs!r} excludes")
    if x is y:
        y = x.view_as(x)  # torch.compile rejects the same tensor passed twice
    shape = size[:-2]
    problem = Problem(
        x,
        y,
        _scale(names[2], scale, shape, x),
        None if row_bias is None else _vector("row_bias", row_bias, size[:-1], x),
        None if col_bias is None else _vector("col_bias", col_bias, other[:-1], x),
        None if row_ids is None else _vector(names[3], row_ids, size[:-1], x, ids=True),
        None if col_ids is None else _vector(names[4], col_ids, other[:-1], x, ids=True),
        PAIRS[pairs],
        positive_shift,
    )
    return Prepared(problem, shape, tiles)


def _operator(problem: Problem, run: Any, formula: Any) -> tuple[Tensor, ...]:
    """run(problem) under torch.func transforms; vmap dimensions come first and become groups."""

    def folded(function: Any) -> Any:
        def on_tensors(lead: tuple[int, ...], x: Tensor, y: Tensor, *vectors: Tensor | None) -> Any:
            flattened = [None if t is None else t.reshape(-1, *t.shape[len(lead) + 1 :]) for t in vectors]
            fields: list[Any] = [x, y, *flattened, problem.pairs, problem.positive_shift]
            return function(Problem(*fields), lead)

        return on_tensors

    return transforms.apply(transforms.Operator(folded(run), folded(formula)), *problem.tensors)


def _statistics(prepared: Prepared, bits: int, backend: str) -> tuple[Tensor, ...]:
    if not transforms.active():
        found: tuple[Tensor, ...] = autograd.StatisticsFunction.apply(*prepared.problem, bits, backend, prepared.tiles)
        return found
    groups = prepared.problem.scale.shape[0]
    grouped = lambda found, lead: [t.reshape(*lead, groups, t.shape[-1]) for t in found]  # noqa: E731
    return _operator(
        prepared.problem,
        lambda p, lead: grouped(autograd.StatisticsFunction.apply(*p, bits, backend, prepared.tiles), lead),
        lambda p, lead: grouped(autograd.differentiable_statistics(p, bits), lead),
    )


def _clipped(prepared: Prepared, bits: int, clip: float, backend: str) -> tuple[Tensor, ...]:
    """Statistics of clipped scores, without gradients."""
    check_number("clip", clip, positive=True, infinite=True)
    groups = prepared.problem.scale.shape[0]

    def run(problem: Problem, lead: tuple[int, ...] = ()) -> list[Tensor]:
        with torch.no_grad():
            found = torch.ops.mi_kernels.dot_critic_stats(*flat(problem, prepared.tiles), bits, float(clip), backend)
        return [t.reshape(*lead, groups, t.shape[-1]).to(found[2].dtype) for t in found]

    if not transforms.active():
        return tuple(run(prepared.problem))
    return tuple(t.detach() for t in _operator(prepared.problem, run, run))


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
    tiles: torch.dtype | None = None,
) -> Statistics:
    """Statistics of the score matrix S = scale x y^T + row_bias + col_bias, which is never stored.

    x, y: [*, B, D] and [*, N, D].
    scale: a number, a 0-d tensor or [*].
    row_bias, col_bias: [*, B] and [*, N]; row_ids and col_ids are integers of the same shapes.
    pairs: "all", "off_diagonal" (i != j) or "unequal_ids".
    stats: any of "row_lse" [*, B], "col_lse" [*, N] and "row_softplus" [*, B] (sum_j softplus S_ij), and together with
        one of them "positive" [*, B] (S_ii, for any `pairs`). A row without pairs has log-sum-exp -inf.
    clip: clamps the scores in the log-sum-exps to [-clip, clip]; the statistics then have no gradient.
    tiles: as in `prepare`.

    Twice differentiable in x, y, scale and the biases. Cost: 2 B N D FLOP forward, 6 B N D backward, O((B + N) D)
    memory. Raises ValueError or TypeError that names the argument, and RuntimeError if a named backend cannot run.
    """
    positive = "positive" in stats
    names = set(stats) - {"positive"}
    if names - set(_STATS) or not names:
        raise ValueError(f"stats must name some of {', '.join(_STATS)}, and may name positive, got {stats!r}")
    prepared = prepare(
        x,
        y,
        scale,
        row_bias=row_bias,
        col_bias=col_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        pairs=pairs,
        positive_shift=0 if positive else -1,
        tiles=tiles,
    )
    bits = sum(_STATS[name] for name in names)
    if clip is None:
        found = _statistics(prepared, bits, backend_name(backend))
    else:
        found = _clipped(prepared, bits, clip, backend_name(backend))
    shaped = (t.reshape(*prepared.shape, t.shape[-1]) for t in found)
    named = dict(zip((*_STATS, "positive"), shaped, strict=False))
    return Statistics(**{name: t for name, t in named.items() if name in stats})


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

    `normalize` first scales the rows of x and y to unit length. If an input requires gradients and autograd records,
    gradients are computed together with the value. Cost with N = 2 B N D FLOP: 3N one-sided, 4N with both log-sum-exps
    (3N if the scores fit `memory_budget` bytes); N without gradients.
    """
    weights = Weights(w_row, w_col, w_soft, w_pos, soft_signed)
    settings = LossSettings(weights, normalize, memory_budget, backend_name(backend), prepared.tiles)
    if transforms.active():
        return _operator(
            prepared.problem,
            lambda p, lead: (autograd.Loss.apply(*p, settings),),
            lambda p, lead: (autograd.differentiable_loss(p, settings),),
        )[0]
    if not torch.is_grad_enabled():
        return autograd.loss_value(prepared.problem, settings)
    return autograd.Loss.apply(*prepared.problem, settings)


def row_losses(
    prepared: Prepared, *, symmetric: bool = False, normalize: bool = False, backend: str | None = None
) -> Tensor:
    """row_lse_i - S_i,pos(i) for every row, [*, B]; symmetric averages it with the same quantity of the positive
    column. `normalize` as in `loss`. 4N FLOP, because gradients need the incoming gradient of every row and recompute
    the scores; 3N on a CPU if the scores fit 16 MiB."""
    settings = RowSettings(symmetric, normalize, backend_name(backend))
    if transforms.active():
        return _operator(
            prepared.problem,
            lambda p, lead: (autograd.RowLosses.apply(*p, settings),),
            lambda p, lead: (autograd.differentiable_row_losses(p, settings),),
        )[0]
    if not torch.is_grad_enabled():
        return autograd.row_losses_value(prepared.problem, settings)
    return autograd.RowLosses.apply(*prepared.problem, settings)
