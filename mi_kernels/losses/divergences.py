"""Distances between distributions by a Gaussian kernel: squared MMD, MMD to a standard normal, and HSIC.

The kernel is k(a, b) = exp(-|a - b|^2 / (2 s^2)) with bandwidth s. All three sum k - 1, because the ones cancel: near
their null the values stay accurate in fp32. No B x B tensor is stored.

Distances come from inner products about the common mean, in units of the bandwidth. Where samples spread so far that
products lose the distance between two near rows (an outlier, clusters far apart), tiles that hold such pairs take it
from differences of the rows: a far row changes the time, not the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from ..ops.common.checks import check_bool, check_choice, check_number, check_samples, check_tensor, positive_values
from ..ops.common.dtypes import accumulate_dtype
from ..ops.rbf import api, median

Bandwidth = float | Tensor | Sequence[float | Tensor] | None
ESTIMATORS = ("biased", "unbiased")
_SAMPLE = 128
_CONSTANT = 1e-20  # an own HSIC below this: every kernel within 1e-10 of 1


def _check(name: str, t: Tensor, like: Tensor | None = None, same_batch: bool = False) -> None:
    check_samples(name, t)
    if like is None:
        return
    kept = slice(None, -1) if same_batch else slice(None, -2)
    if t.shape[kept] != like.shape[kept] or (not same_batch and t.shape[-1] != like.shape[-1]):
        free = "features" if same_batch else "batch"
        raise ValueError(
            f"{name} {tuple(t.shape)} must agree with x {tuple(like.shape)} in all but the {free} dimension"
        )
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of x, {like.device}, got {t.device}")


def _flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.reshape(-1, *t.shape[-2:]).to(dtype)


def _subsample(t: Tensor) -> Tensor:
    """At most 128 rows, evenly spaced: the same ones every time."""
    batch = t.shape[-2]
    if batch <= _SAMPLE:
        return t
    return t[:, torch.arange(_SAMPLE, device=t.device) * batch // _SAMPLE]


def median_distance(*samples: Tensor) -> Tensor:
    """The median heuristic, [G]: median distance between distinct rows of the pooled samples [G, ., D]; 1 if it is 0.

    At most 128 evenly spaced rows of each sample take part: deterministic, at most 2^16 distances a group, and the same
    whatever the order of the samples. A constant: no gradient flows through it.
    """
    return median.median_distance(torch.cat([_subsample(t.detach().to(accumulate_dtype(t.dtype))) for t in samples], 1))


def _is_sequence(bandwidth: Bandwidth) -> TypeGuard[Sequence[float | Tensor]]:
    return isinstance(bandwidth, Sequence) and not isinstance(bandwidth, str | bytes)


def _bandwidths(given: Bandwidth, groups: torch.Size, like: Tensor) -> Tensor:
    """Bandwidths [G, K] from one (number, 0-d tensor or [*]) or a sequence of K."""
    several = given if _is_sequence(given) else (given,)
    if len(several) == 0:
        raise ValueError("bandwidth must hold at least one number, got an empty sequence")
    return torch.stack([_column(s, groups, like) for s in several], -1)


def _column(s: object, groups: torch.Size, like: Tensor) -> Tensor:
    """One bandwidth as [G]. Numbers are filled in: a copy from the host would stall a GPU and break graph capture."""
    if not isinstance(s, Tensor):
        check_number("bandwidth", s, positive=True)
        limits = torch.finfo(like.dtype)
        if not limits.tiny <= s <= limits.max:  # type: ignore[operator]
            raise ValueError(f"bandwidth must be within the range of {like.dtype}, got {s}")
        value = s if isinstance(s, torch.SymFloat | torch.SymInt) else float(s)  # type: ignore[arg-type]
        return like.new_full((groups.numel(),), value)  # type: ignore[arg-type]
    check_tensor("bandwidth", s)
    if s.numel() != 1 and s.shape != groups:
        raise ValueError(f"bandwidth must be a number, a 0-d tensor or {tuple(groups)}, got {tuple(s.shape)}")
    positive_values("bandwidth", s)
    return s.to(like).reshape(-1).expand(groups.numel())


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: Bandwidth = None,
    estimator: str = "biased",
    backend: str | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy between two samples, [*] (Gretton et al. 2012).

    x [*, B, D], y [*, N, D]; kernel "rbf", exp(-|a - b|^2 / (2 s^2)). bandwidth s: a number, a 0-d tensor (learnable),
    one a group [*], or a sequence, whose kernels are averaged; None is the median distance between rows of x and y
    pooled (at most 128 evenly spaced rows of each). estimator "biased" (diagonals included, never negative beyond
    rounding) or "unbiased" (may be negative; needs two rows of each).

    fp32 out (fp64 for fp64), summed as k - 1 in fp64. Differentiable twice in x, y and a tensor bandwidth; the
    gradients are computed with the value. Cost forward and backward, with M = 2 B N D FLOP and B = N: 6M compiled,
    where the symmetric sums are halved, 7M in plain torch, and several times that for tiles that need differences of
    rows; O((B + N) D) memory. Raises ValueError or TypeError naming the argument.
    """
    _check("x", x)
    _check("y", y, x)
    if kernel != "rbf":
        raise ValueError(f"kernel must be 'rbf', got {kernel!r}")
    check_choice("estimator", estimator, ESTIMATORS)
    rows, columns = x.shape[-2], y.shape[-2]
    less = 0 if estimator == "biased" else 1
    if less and min(rows, columns) < 2:
        raise ValueError(f"estimator='unbiased' needs two rows of each, got x {tuple(x.shape)} and y {tuple(y.shape)}")
    dtype = torch.promote_types(accumulate_dtype(x.dtype), accumulate_dtype(y.dtype))
    groups = x.shape[:-2]
    a, b = _flat(x, dtype), _flat(y, dtype)
    s = median_distance(a, b)[:, None] if bandwidth is None else _bandwidths(bandwidth, groups, a)
    found = api.mmd(
        a, b, s, 1 / (rows * (rows - less)), 1 / (columns * (columns - less)), -2 / (rows * columns), backend
    )
    return found.to(dtype).reshape(groups)


def gaussian_mmd(
    z: Tensor,
    *,
    bandwidth: float | Tensor | None = None,
    prior_samples: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Squared MMD between z and N(0, I), [*]: the regulariser of MFM (Tsai et al. 2019) without its sampling noise.

    z [*, B, D]. The expectations over the prior are exact: with g, g' ~ N(0, I),
    E k(g, g') = (1 + 2 / s^2)^(-D / 2) and E k(z, g) = (1 + 1 / s^2)^(-D / 2) exp(-|z|^2 / (2 (s^2 + 1))). bandwidth s
    is D / sqrt 2 by default, MFM's kernel exp(-|a - b|^2 / D^2). The sum over pairs of z is biased, as in MFM.

    prior_samples [*, N, D] gives the published form instead, mmd(z, prior_samples). Its expectation is larger by
    (1 - E k(g, g')) / N, the diagonal of the prior's own sum.

    fp32 out (fp64 for fp64); no terms near 1 are subtracted, so that values of 1e-4 keep five digits. Differentiable
    twice. Cost 2 B^2 D FLOP forward (half of it compiled), twice as much for the gradient; O(B D) memory. Raises
    ValueError or TypeError naming the argument.
    """
    _check("z", z)
    depth, batch, groups = z.shape[-1], z.shape[-2], z.shape[:-2]
    s: float | Tensor = depth / math.sqrt(2) if bandwidth is None else bandwidth
    if not isinstance(s, Tensor):
        check_number("bandwidth", s, positive=True)
    if prior_samples is not None:
        _check("prior_samples", prior_samples, z)
        return mmd(z, prior_samples, bandwidth=s, backend=backend)
    flat = _flat(z, accumulate_dtype(z.dtype))
    widths = _bandwidths(s, groups, flat)
    own = api.mmd(flat, flat[:, :0], widths, 1 / batch**2, 0.0, 0.0, backend)
    inverse = widths[:, 0].double() ** -2
    prior = torch.expm1(-0.5 * depth * torch.log1p(2 * inverse))
    squares = flat.square().sum(-1, dtype=torch.float64)
    to_prior = -0.5 * depth * torch.log1p(inverse)[:, None] - 0.5 * squares * (inverse / (1 + inverse))[:, None]
    return (own + prior - 2 * torch.expm1(to_prior).mean(-1)).to(flat.dtype).reshape(groups)


def hsic(
    x: Tensor, y: Tensor, *, bandwidth: Bandwidth = None, normalized: bool = True, backend: str | None = None
) -> Tensor:
    """Hilbert-Schmidt independence criterion, biased: tr(K H L H) / B^2, [*] (Gretton et al. 2005, with B for B - 1).

    x [*, B, Dx], y [*, B, Dy]; Gaussian kernels. bandwidth: one for both (number, 0-d tensor or [*]), a pair (of x, of
    y), or None for the median distance within each. normalized divides by sqrt(HSIC(x, x) HSIC(y, y)): in [0, 1], the
    kernel CKA of Kornblith et al. 2019. A constant x or y gives 0, not 0 / 0, with gradient 0.

    The biased estimate is never negative beyond rounding; under independence it is of order 1 / B. fp32 out (fp64 for
    fp64). Differentiable twice in x, y and a tensor bandwidth. Cost 2 B^2 (Dx + Dy) FLOP forward, twice that backward
    in Triton, three times in plain torch, which holds at most 32 MiB of pairs at a time; compiled half of the first and
    three times that half. O(B D) memory. Raises ValueError or TypeError naming the argument, RuntimeError if a backend
    that was named cannot run.
    """
    _check("x", x)
    _check("y", y, x, same_batch=True)
    check_bool(normalized=normalized)
    groups = x.shape[:-2]
    dtype = torch.promote_types(accumulate_dtype(x.dtype), accumulate_dtype(y.dtype))
    a, b = _flat(x, dtype), _flat(y, dtype)
    pair = bandwidth if _is_sequence(bandwidth) else (bandwidth, bandwidth)
    if len(pair) != 2:
        raise ValueError(f"bandwidth must be one for both or a pair, got {len(pair)} of them")
    sx, sy = (
        median_distance(t) if s is None else _column(s, groups, t) for s, t in zip(pair, (a, b), strict=True)
    )
    cross, own_x, own_y = api.hsic(a, b, sx, sy, backend).unbind(-1)
    if not normalized:
        return cross.to(dtype).reshape(groups)
    known = ~(torch.minimum(own_x, own_y) <= _CONSTANT)  # written so that NaN propagates
    ratio = cross / torch.where(known, own_x * own_y, 1.0).sqrt()
    return torch.where(known, ratio, 0.0).to(dtype).reshape(groups)
