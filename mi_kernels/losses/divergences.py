"""Kernel distances between distributions: squared MMD, squared MMD to a standard normal, and HSIC.

The kernel is k(a, b) = exp(-|a - b|^2 / (2 s^2)) with bandwidth s. All three sum k - 1 instead of k, because the ones
cancel; values near 0 therefore stay accurate in fp32. No B x B tensor is stored.

Squared distances are computed from inner products of centred rows, in units of the bandwidth. Inner products lose the
small distance between two near rows if the sample also has an outlier or distant clusters. Tiles with such pairs
compute distances from differences of rows instead: a distant row costs time, not accuracy.
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
_CONSTANT = 1e-20  # HSIC(x, x) below this means a constant sample: every kernel value is within 1e-10 of 1


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
    """At most 128 evenly spaced rows, always the same ones."""
    batch = t.shape[-2]
    if batch <= _SAMPLE:
        return t
    return t[:, torch.arange(_SAMPLE, device=t.device) * batch // _SAMPLE]


def median_distance(*samples: Tensor) -> Tensor:
    """The median heuristic, [G]: the median distance between different rows of the pooled samples [G, ., D], or 1 if it
    is 0.

    At most 128 evenly spaced rows of each sample are used, which gives at most 2^16 distances per group. The result is
    deterministic and does not depend on the order of the samples. No gradient flows through it.
    """
    return median.median_distance(torch.cat([_subsample(t.detach().to(accumulate_dtype(t.dtype))) for t in samples], 1))


def _is_sequence(bandwidth: Bandwidth) -> TypeGuard[Sequence[float | Tensor]]:
    return isinstance(bandwidth, Sequence) and not isinstance(bandwidth, (str, bytes))


def _bandwidths(given: Bandwidth, groups: torch.Size, like: Tensor) -> Tensor:
    """Bandwidths [G, K] from one bandwidth (a number, a 0-d tensor or [*]) or from a sequence of K bandwidths."""
    several = given if _is_sequence(given) else (given,)
    if len(several) == 0:
        raise ValueError("bandwidth must hold at least one number, got an empty sequence")
    return torch.stack([_column(s, groups, like) for s in several], -1)


def _column(s: object, groups: torch.Size, like: Tensor) -> Tensor:
    """One bandwidth as [G]. Numbers are filled in on the device: a copy from the host would stall a GPU and break graph
    capture."""
    if not isinstance(s, Tensor):
        check_number("bandwidth", s, positive=True)
        limits = torch.finfo(like.dtype)
        if not limits.tiny <= s <= limits.max:  # type: ignore[operator]
            raise ValueError(f"bandwidth must be within the range of {like.dtype}, got {s}")
        value = s if isinstance(s, (torch.SymFloat, torch.SymInt)) else float(s)  # type: ignore[arg-type]
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

    x: [*, B, D].
    y: [*, N, D].
    kernel: "rbf", exp(-|a - b|^2 / (2 s^2)).
    bandwidth: s, as a number, a 0-d tensor (may be learnable) or one value per group [*]; or a sequence of them, whose
        kernels are averaged. None is the median distance between rows of x and y (at most 128 evenly spaced rows of
        each).
    estimator: "biased" includes the diagonals and is never negative except for rounding; "unbiased" may be negative and
        needs two rows of each sample.
    backend: name of a backend; by default chosen from the device.

    Returns fp32 (fp64 for fp64 inputs), summed in fp64. Twice differentiable in x, y and a tensor bandwidth; gradients
    are computed together with the value. Cost of forward and backward, with M = 2 B N D FLOP and B = N: 6M in the
    compiled extension, which halves the symmetric sums, 7M in plain torch, and several times as much for tiles that
    need differences of rows; O((B + N) D) memory. Raises ValueError or TypeError that names the argument.
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

    z: [*, B, D].
    bandwidth: s, by default D / sqrt 2, which is MFM's kernel exp(-|a - b|^2 / D^2).
    prior_samples: [*, N, D]; if given, computes the published form mmd(z, prior_samples). Its expectation is larger by
        (1 - E k(g, g')) / N, because the sum over prior samples includes its diagonal.
    backend: name of a backend; by default chosen from the device.

    Without prior_samples the expectations over the prior are exact: with g, g' ~ N(0, I),
    E k(g, g') = (1 + 2 / s^2)^(-D / 2) and E k(z, g) = (1 + 1 / s^2)^(-D / 2) exp(-|z|^2 / (2 (s^2 + 1))). The sum over
    pairs of z includes the diagonal (biased), as in MFM.

    Returns fp32 (fp64 for fp64 inputs). No two numbers near 1 are subtracted, so values of 1e-4 keep five digits. Twice
    differentiable. Cost: 2 B^2 D FLOP forward (half of that compiled), twice as much for the gradient; O(B D) memory.
    Raises ValueError or TypeError that names the argument.
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

    x: [*, B, Dx].
    y: [*, B, Dy], rows paired with x.
    bandwidth: of the Gaussian kernels. One for both (a number, a 0-d tensor or [*]), a pair (of x, of y), or None for
        the median distance within each sample.
    normalized: divide by sqrt(HSIC(x, x) HSIC(y, y)). The result lies in [0, 1] and is the kernel CKA of Kornblith et
        al.
        2019. A constant x or y gives 0 with gradient 0.
    backend: name of a backend; by default chosen from the device.

    The biased estimate is never negative except for rounding; for independent samples it is of order 1 / B. Returns
    fp32 (fp64 for fp64 inputs). Twice differentiable in x, y and a tensor bandwidth. Cost forward: 2 B^2 (Dx + Dy)
    FLOP, half of that in the compiled extension. Cost backward: three times the forward pass, twice in Triton. O(B D)
    memory; plain torch holds at most 32 MiB of pairs at a time. Raises ValueError or TypeError that names the argument,
    and RuntimeError if a named backend cannot run.
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
