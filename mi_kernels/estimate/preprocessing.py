"""Features of x and of y for the critics, fitted on the training samples.

Mutual information does not change under injective maps of x and of y, and any function of x is a valid feature of a
critic. Mapping ranks to normal quantiles makes every marginal Gaussian: a Gaussian copula becomes a Gaussian, and heavy
tails stay bounded. Ranks alone would lose the joint geometry of the raw coordinates, so the features also include their
asinh and two radii. The radius shows dependence through a common scale (Student distribution) and rotations by an angle
that depends on it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FREQUENCIES = 8
# The largest distance from the median, in units of the spread. Beyond it coordinates say no more than their ranks do.
# (The largest of N Cauchy samples is of order N.)
FARTHEST = 1e8


class Coordinates(NamedTuple):
    """The features of x or of y, float32."""

    normal: Tensor  # [n, d], every coordinate standard normal
    turned: Tensor  # [n, 2 d], `normal` and its products with the standardised radius; [n, d] if d = 1
    radii: Tensor  # [n, 2], standardised; [n, 0] if d = 1
    features: Tensor  # [n, F], the inputs of networks without a Gaussian part


class RankNormal:
    """Maps every coordinate to the standard normal quantile of its rank among the fitted samples.

    Ranks between two fitted values are interpolated, ties get their mean rank, and values outside the fitted range get
    the lowest or highest rank. O(n log n) for n samples.
    """

    def __init__(self, fitted: Tensor):
        self.sorted = fitted.double().mT.contiguous().sort(-1).values  # [d, n]

    def __call__(self, v: Tensor) -> Tensor:
        n = self.sorted.shape[-1]
        values = v.double().mT.contiguous()
        below = torch.searchsorted(self.sorted, values)
        up_to = torch.searchsorted(self.sorted, values, right=True)
        right = below.clamp(1, n - 1)
        low, high = self.sorted.gather(-1, right - 1), self.sorted.gather(-1, right)
        fraction = ((values - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1)
        rank = torch.where(up_to > below, (below + up_to) / 2, right - 0.5 + fraction)
        return torch.special.ndtri((rank / n).clamp(0.5 / n, 1 - 0.5 / n)).mT


class Preprocessing:
    """Computes the `Coordinates` of x or of y. v [n, d] is float64, with at least two samples and no constant
    column."""

    def __init__(self, fitted: Tensor):
        self.dim = fitted.shape[-1]
        quartiles = torch.stack([_quantile(fitted, q) for q in (0.25, 0.5, 0.75)])
        spread = (quartiles[2] - quartiles[0]) / 1.349
        # The spread is 0 if half of the values of a mostly discrete column are equal.
        spread = torch.where(spread > 0, spread, fitted.std(0))
        self.centre, self.spread = quartiles[1], torch.where(spread > 0, spread, torch.ones_like(spread))
        self.rank = RankNormal(fitted)
        self.radius_rank = RankNormal(self._radii(fitted))

    def distance(self, v: Tensor) -> Tensor:
        """The signed distance of every coordinate from the median, in units of the spread: [n, d]."""
        return ((v - self.centre) / self.spread).abs()

    def _radii(self, v: Tensor) -> Tensor:
        # Squares of values beyond 1e150 would overflow and give NaN ranks.
        raw = self.distance(v).clamp(max=1e150).square().sum(-1)
        return torch.stack([raw, self.rank(v).square().sum(-1)], -1)

    def __call__(self, v: Tensor) -> Coordinates:
        normal = self.rank(v)
        raw = torch.asinh(((v - self.centre) / self.spread).clamp(-FARTHEST, FARTHEST))
        if self.dim == 1:
            # Cosines of the ranks let a smooth network represent sharp edges, such as those of uniform noise. In more
            # dimensions they only overfit.
            phase = math.pi * torch.arange(1, FREQUENCIES + 1, device=v.device) * torch.special.ndtr(normal)
            extra, turned, radii = phase.cos(), normal, normal[:, :0]
        else:
            extra = radii = self.radius_rank(self._radii(v))
            turned = torch.cat([normal, normal * radii[:, :1]], -1)
        features = torch.cat([normal, raw, extra], -1)
        return Coordinates(normal.float(), turned.float(), radii.float(), features.float())


def _quantile(v: Tensor, q: float) -> Tensor:
    # torch.quantile does not support more than 16 million values.
    return v.kthvalue(min(v.shape[0], 1 + int(q * v.shape[0])), dim=0).values
