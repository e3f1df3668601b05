"""What a critic sees of a sample: maps of x alone and of y alone, fitted on the samples that train the critic.

Mutual information does not change under injective maps of either side, and any function of x is a valid feature of a
critic. Ranks sent to normal quantiles make every marginal Gaussian, so that a Gaussian copula becomes a Gaussian and
heavy tails stay bounded. Ranks alone would lose the geometry that the raw coordinates share, so their asinh and two
radii come along: the radius carries dependence through a common scale (Student) and rotations by the radius.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FREQUENCIES = 8
# In spreads from the median. Farther out, coordinates tell no more than their ranks; Cauchy draws reach N.
FARTHEST = 1e8


class Coordinates(NamedTuple):
    """One side of the samples as the critics take it, float32."""

    normal: Tensor  # [n, d], every coordinate standard normal
    turned: Tensor  # [n, 2 d], these and their products with the standardised radius; [n, d] where d = 1
    radii: Tensor  # [n, 2], standardised; [n, 0] where d = 1
    features: Tensor  # [n, F], what networks see that learn everything


class RankNormal:
    """Coordinate by coordinate, ranks among the fitted samples sent to standard normal quantiles.

    Between two fitted values ranks are interpolated, ties take their middle rank, values outside the fitted range take
    the outermost. O(n log n) for n samples.
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
    """Coordinates of one side. v [n, d] float64, at least two samples, no constant column."""

    def __init__(self, fitted: Tensor):
        self.dim = fitted.shape[-1]
        quartiles = torch.stack([_quantile(fitted, q) for q in (0.25, 0.5, 0.75)])
        spread = (quartiles[2] - quartiles[0]) / 1.349
        # Half of the values of a mostly discrete column may be equal.
        spread = torch.where(spread > 0, spread, fitted.std(0))
        self.centre, self.spread = quartiles[1], torch.where(spread > 0, spread, torch.ones_like(spread))
        self.rank = RankNormal(fitted)
        self.radius_rank = RankNormal(self._radii(fitted))

    def distance(self, v: Tensor) -> Tensor:
        """From the median, in spreads, coordinate by coordinate: [n, d]."""
        return ((v - self.centre) / self.spread).abs()

    def _radii(self, v: Tensor) -> Tensor:
        # 1e150: squares of farther points would overflow, and NaN ranks follow.
        raw = self.distance(v).clamp(max=1e150).square().sum(-1)
        return torch.stack([raw, self.rank(v).square().sum(-1)], -1)

    def __call__(self, v: Tensor) -> Coordinates:
        normal = self.rank(v)
        raw = torch.asinh(((v - self.centre) / self.spread).clamp(-FARTHEST, FARTHEST))
        if self.dim == 1:
            # Waves over the ranks let a smooth network draw sharp edges, as of a uniform noise; in more dimensions
            # they only overfit.
            phase = math.pi * torch.arange(1, FREQUENCIES + 1, device=v.device) * torch.special.ndtr(normal)
            extra, turned, radii = phase.cos(), normal, normal[:, :0]
        else:
            extra = radii = self.radius_rank(self._radii(v))
            turned = torch.cat([normal, normal * radii[:, :1]], -1)
        features = torch.cat([normal, raw, extra], -1)
        return Coordinates(normal.float(), turned.float(), radii.float(), features.float())


def _quantile(v: Tensor, q: float) -> Tensor:
    # torch.quantile refuses more than 16 million values.
    return v.kthvalue(min(v.shape[0], 1 + int(q * v.shape[0])), dim=0).values
