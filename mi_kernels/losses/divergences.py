"""Distances between distributions by a Gaussian kernel: squared MMD, MMD to a standard normal, and HSIC.

The kernel is k(a, b) = exp(-|a - b|^2 / (2 s^2)) with bandwidth s. Everything is summed as k - 1, since the ones cancel
exactly in all three: near their null the values stay accurate in fp32. No B x B tensor exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.common.checks import check_samples
from ..ops.common.dtypes import accumulate_dtype
from ..ops.rbf import api
from ..ops.rbf.reference import centred, squared_distances

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
        raise ValueError(f"{name} {tuple(t.shape)} must agree with {tuple(like.shape)} in all but the {free} dimension")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, expected {like.device}")


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
    pooled = torch.cat([_subsample(t.detach().to(accumulate_dtype(t.dtype))) for t in samples], 1)
    if pooled.shape[1] < 2:
        return pooled.new_ones(pooled.shape[0])
    first, second = torch.triu_indices(pooled.shape[1], pooled.shape[1], 1, device=pooled.device)
    about_mean, _ = centred(pooled)
    found = squared_distances(about_mean, about_mean, 0)[:, first, second].median(-1).values
    return torch.where(found > 0, found, 1.0).sqrt()


def _gamma(bandwidth: Bandwidth, groups: torch.Size, like: Tensor) -> Tensor:
    """1 / (2 s^2), [G, K], from one bandwidth (number, 0-d tensor or [*]) or a sequence of K."""
    if isinstance(bandwidth, str):
        raise TypeError(f"bandwidth must be a number, a tensor or a sequence of them, got {bandwidth!r}")
    several = bandwidth if isinstance(bandwidth, Sequence) else (bandwidth,)
    if len(several) == 0:
        raise ValueError("bandwidth must hold at least one number, got an empty sequence")
    values = [float(s) for s in several if isinstance(s, float | int)]
    if len(values) == len(several):
        if not all(v > 0 for v in values):
            raise ValueError(f"bandwidth must be positive, got {bandwidth}")
        # filled, not copied from the host: a copy would stall a GPU and cannot be captured in a graph
        return torch.stack([like.new_full((groups.numel(),), 0.5 / v**2) for v in values], -1)
    columns = []
    for s in several:
        if s is None:
            raise ValueError("bandwidth must hold numbers or tensors, got None in a sequence")
        t = s.to(like) if isinstance(s, Tensor) else like.new_full((), s)
        if t.numel() != 1 and t.shape != groups:
            raise ValueError(f"bandwidth must be a number, a 0-d tensor or {tuple(groups)}, got {tuple(t.shape)}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and not (t.detach() > 0).all():
            raise ValueError(f"bandwidth must be positive, got {t.detach().tolist()}")
        columns.append(0.5 / t.reshape(-1).expand(groups.numel()).square())
    return torch.stack(columns, -1)


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
    gradients are computed with the value. Distances come from inner products about the common mean: in fp32, pairs
    nearer to each other than a thousandth of their distance from it count as equal. Cost forward and backward, with
    M = 2 B N D FLOP and B = N: 6M compiled, where the symmetric sums are halved, 7M in plain torch; O((B + N) D)
    memory. Raises ValueError or TypeError naming the argument.
    """
    _check("x", x)
    _check("y", y, x)
    if kernel != "rbf":
        raise ValueError(f"kernel must be 'rbf', got {kernel!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    rows, columns = x.shape[-2], y.shape[-2]
    less = 0 if estimator == "biased" else 1
    if less and min(rows, columns) < 2:
        raise ValueError(f"estimator='unbiased' needs two rows of each, got x {tuple(x.shape)} and y {tuple(y.shape)}")
    dtype = torch.promote_types(accumulate_dtype(x.dtype), accumulate_dtype(y.dtype))
    groups = x.shape[:-2]
    a, b = _flat(x, dtype), _flat(y, dtype)
    gamma = _gamma(median_distance(a, b).view(groups) if bandwidth is None else bandwidth, groups, a)
    found = api.mmd(
        a, b, gamma, 1 / (rows * (rows - less)), 1 / (columns * (columns - less)), -2 / (rows * columns), backend
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
    s = depth / math.sqrt(2) if bandwidth is None else bandwidth
    if prior_samples is not None:
        _check("prior_samples", prior_samples, z)
        return mmd(z, prior_samples, bandwidth=s, backend=backend)
    flat = _flat(z, accumulate_dtype(z.dtype))
    gamma = _gamma(s, groups, flat)
    if gamma.shape[-1] != 1:
        raise ValueError(f"bandwidth must be one number or 0-d tensor, got {gamma.shape[-1]} of them")
    own = api.mmd(flat, flat[:, :0], gamma, 1 / batch**2, 0.0, 0.0, backend)
    inverse = 2 * gamma[:, 0].double()  # 1 / s^2
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
    groups = x.shape[:-2]
    dtype = torch.promote_types(accumulate_dtype(x.dtype), accumulate_dtype(y.dtype))
    (a, _), (b, _) = centred(_flat(x, dtype)), centred(_flat(y, dtype))
    pair = bandwidth if isinstance(bandwidth, Sequence) else (bandwidth, bandwidth)
    if len(pair) != 2:
        raise ValueError(f"bandwidth must be one for both or a pair, got {len(pair)} of them")
    gx, gy = (
        _gamma(median_distance(t).view(groups) if s is None else s, groups, t)[:, 0]
        for s, t in zip(pair, (a, b), strict=True)
    )
    cross, own_x, own_y = api.hsic(a, b, gx, gy, backend).unbind(-1)
    if not normalized:
        return cross.to(dtype).reshape(groups)
    known = ~(torch.minimum(own_x, own_y) <= _CONSTANT)  # this way round a NaN shows
    ratio = cross / torch.where(known, own_x * own_y, 1.0).sqrt()
    return torch.where(known, ratio, 0.0).to(dtype).reshape(groups)
