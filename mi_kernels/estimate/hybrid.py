"""The hybrid critic: the log density ratio of a Gaussian plus the scores of two small networks.

For canonical variates u_k, v_k with correlations r_k the log density ratio of a Gaussian is, up to a constant,

    sum_k  r_k u_k v_k / (1 - r_k^2)  -  r_k^2 (u_k^2 + v_k^2) / (2 (1 - r_k^2)).

This is an inner product of functions of x and of y, and so are the scores of the networks, <g(x), h(y)> + p(x) + q(y).
The sum is again an inner product, so every bound with this critic costs one fused pass of 2 B N (E + K + 2) FLOP and
O(B) memory. The InfoNCE bound on validation samples decides how many canonical pairs are used; for example, fifty
dimensions with one common factor then need only one pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds.info_nce import SymmetricInfoNCE
from ..critics import ConcatCritic, Critic, InnerProductCritic
from ..ops.common.statistics import Statistics
from .preprocessing import Coordinates

RIDGE = 1e-4
LARGEST_CORRELATION = 0.9999
HIDDEN, EMBEDDING = 96, 24
SCALAR_HIDDEN = 32
# An additional canonical pair must raise the bound on the validation samples by at least this many nats.
LEAST_GAIN = 2e-3
PATIENCE = 3

Part = tuple[Coordinates, Coordinates]


@dataclass
class CanonicalPairs:
    """Canonical directions of x and y, strongest correlation first, fitted on the training samples."""

    turned: bool
    x_mean: Tensor
    y_mean: Tensor
    x_directions: Tensor  # [Dx, K]
    y_directions: Tensor  # [Dy, K]
    correlations: Tensor  # [K]
    other: CanonicalPairs | None = None  # pairs of the other kind of coordinates, also an input of the networks

    @classmethod
    def fit(cls, x: Coordinates, y: Coordinates, turned: bool) -> CanonicalPairs:
        """Canonical correlation analysis in float64: O(n (Dx + Dy)^2 + (Dx + Dy)^3)."""
        a, b = ((c.turned if turned else c.normal).double() for c in (x, y))
        a_mean, b_mean = a.mean(0), b.mean(0)
        a, b = a - a_mean, b - b_mean
        a_root, b_root = _root(a), _root(b)
        cross = torch.linalg.solve_triangular(a_root, a.mT @ b / a.shape[0], upper=False)
        cross = torch.linalg.solve_triangular(b_root, cross.mT, upper=False).mT
        left, correlations, right = torch.linalg.svd(cross, full_matrices=False)
        of_x = torch.linalg.solve_triangular(a_root.mT, left, upper=True)
        of_y = torch.linalg.solve_triangular(b_root.mT, right.mT, upper=True)
        return cls(turned, a_mean, b_mean, of_x, of_y, correlations.clamp(max=LARGEST_CORRELATION))

    def first(self, k: int) -> CanonicalPairs:
        of_x, of_y = self.x_directions[:, :k], self.y_directions[:, :k]
        return CanonicalPairs(self.turned, self.x_mean, self.y_mean, of_x, of_y, self.correlations[:k])

    def variates(self, x: Coordinates, y: Coordinates) -> tuple[Tensor, Tensor]:
        """The canonical variates of both sides, [n, K] each, in float64."""
        u = ((x.turned if self.turned else x.normal).double() - self.x_mean) @ self.x_directions
        v = ((y.turned if self.turned else y.normal).double() - self.y_mean) @ self.y_directions
        return u, v

    def inputs(self, x: Coordinates, y: Coordinates) -> tuple[Tensor, Tensor]:
        """The inputs of `HybridCritic`, per sample: the K weighted variates, the quadratic term, the inputs of networks
        that are added to the Gaussian, and the inputs of networks without a Gaussian."""
        r = self.correlations
        u, v = self.variates(x, y)
        weight, quadratic = r / (1 - r * r), -0.5 * r * r / (1 - r * r)
        of_x, of_y = (u.square() * quadratic).sum(-1, keepdim=True), (v.square() * quadratic).sum(-1, keepdim=True)
        x_seen, y_seen = self._seen_on_top(x, y)
        left = torch.cat([(u * weight).float(), of_x.float(), x_seen, x.features], -1)
        return left, torch.cat([v.float(), of_y.float(), y_seen, y.features], -1)

    def _seen_on_top(self, x: Coordinates, y: Coordinates) -> list[Tensor]:
        """The variates with linear dependence, and the radii. With all coordinates the networks would mostly fit noise.
        If x or y has one coordinate, its features are used instead."""
        kinds = [self.variates(x, y)] + ([self.other.variates(x, y)] if self.other else [])
        variates = [torch.cat(side, -1).float() for side in zip(*kinds, strict=True)]
        return [
            side.features if side.normal.shape[-1] == 1 else torch.cat([own, side.radii], -1)
            for own, side in zip(variates, (x, y), strict=True)
        ]

    def widths(self, x: Coordinates, y: Coordinates) -> list[tuple[int, int]]:
        """For x and y: the numbers of input columns of networks added to a Gaussian, and of networks without one."""
        seen = self._seen_on_top(*(Coordinates(*(t[:1] for t in side)) for side in (x, y)))
        return [(own.shape[-1], side.features.shape[-1]) for own, side in zip(seen, (x, y), strict=True)]


def _root(v: Tensor) -> Tensor:
    covariance = v.mT @ v / v.shape[0]
    scale = covariance.diagonal().mean()
    root: Tensor = torch.linalg.cholesky(
        covariance + (RIDGE * scale).clamp_min(1e-12) * torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    )
    return root


def choose_pairs(train: Part, validation: Part) -> tuple[CanonicalPairs, float]:
    """The canonical pairs (possibly none) whose Gaussian critic has the highest InfoNCE on the validation samples."""
    turned = (False, True) if train[0].turned.shape != train[0].normal.shape else (False,)
    found = [_best_pairs(CanonicalPairs.fit(*train, turned=t), validation) for t in turned]
    if len(found) == 1:
        return found[0]
    (best, value), (other, _) = found if found[0][1] >= found[1][1] - LEAST_GAIN else reversed(found)
    best.other = other
    return best, value


def _best_pairs(pairs: CanonicalPairs, validation: Part) -> tuple[CanonicalPairs, float]:
    best, value, waited = pairs.first(0), 0.0, 0
    objective = SymmetricInfoNCE(GaussianCritic())
    for k in range(1, pairs.correlations.numel() + 1):
        a, b = pairs.first(k).inputs(*validation)
        found = objective(a[:, : k + 1], b[:, : k + 1]).item()
        waited = 0 if found > value + LEAST_GAIN else waited + 1
        if not waited:
            best, value = pairs.first(k), found
        if waited == PATIENCE:
            break
    return best, value


class GaussianCritic(InnerProductCritic):
    """Only the Gaussian log density ratio; uses the first K + 1 columns of `CanonicalPairs.inputs`, [*, B, K + 1]."""

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        return _with_terms([x[..., :-1]], x[..., -1:]), _with_terms([y[..., :-1]], y[..., -1:], last=True), 1.0


def _with_terms(factors: Sequence[Tensor], own: Tensor, last: bool = False) -> Tensor:
    """Appends an additive term to the factors: (own, 1) for x and (1, own) for y, so that the inner product adds
    both."""
    one = torch.ones_like(own)
    return torch.cat([*factors, one, own] if last else [*factors, own, one], -1)


class _Network(nn.Module):
    def __init__(self, width: int, silent: bool):
        super().__init__()
        self.first, self.second = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, EMBEDDING + 1)
        nn.init.zeros_(self.last.bias)
        # <g, h>, p and q start at zero. Only one side is zero in <g, h>, so the gradient is not.
        nn.init.zeros_(self.last.weight if silent else self.last.weight[EMBEDDING:])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        out = self.last(F.silu(self.second(F.silu(self.first(features)))))
        return out[..., :EMBEDDING], out[..., EMBEDDING:]


class HybridCritic(InnerProductCritic):
    """Gaussian log density ratio with learned gates, plus <g(x), h(y)> + p(x) + q(y).

    x and y are `CanonicalPairs.inputs`, [*, B, .]; `x_widths` and `y_widths` are `CanonicalPairs.widths`. With
    `gaussian=False` there is no Gaussian part, and the networks read the features in the last columns.
    """

    def __init__(self, pairs: int, x_widths: tuple[int, int], y_widths: tuple[int, int], gaussian: bool = True):
        super().__init__()
        self.pairs, self.gaussian = pairs, gaussian
        self.x_widths, self.y_widths = x_widths, y_widths
        which = 0 if gaussian else 1
        self.x_network = _Network(x_widths[which], silent=False)
        self.y_network = _Network(y_widths[which], silent=True)
        self.gates = nn.Parameter(torch.ones(pairs), requires_grad=gaussian)
        self.quadratic_gate = nn.Parameter(torch.ones(()), requires_grad=gaussian)

    def _seen(self, t: Tensor, widths: tuple[int, int]) -> Tensor:
        first = self.pairs + 1 + (0 if self.gaussian else widths[0])
        return t[..., first : first + widths[0 if self.gaussian else 1]]

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        k = self.pairs
        (g, p), (h, q) = self.x_network(self._seen(x, self.x_widths)), self.y_network(self._seen(y, self.y_widths))
        if not self.gaussian:
            return _with_terms([g], p), _with_terms([h], q, last=True), 1.0
        p, q = p + self.quadratic_gate * x[..., k : k + 1], q + self.quadratic_gate * y[..., k : k + 1]
        left = _with_terms([x[..., :k] * self.gates, g], p)
        return left, _with_terms([y[..., :k], h], q, last=True), 1.0


class ScalarCritic(Critic):
    """A small network on the concatenated pair, for scalar x and y.

    The support of the density may have edges along lines in the (x, y) plane, for example with uniform noise. A few
    units of such a network can represent them; an inner product of smooth functions of x and y cannot. The network is
    small enough to evaluate on every pair. x and y are `CanonicalPairs.inputs`, [*, B, .], of which it reads the last
    columns.
    """

    def __init__(self, x_width: int, y_width: int):
        super().__init__()
        self.x_width, self.y_width = x_width, y_width
        self.network = ConcatCritic(x_width, y_width, (SCALAR_HIDDEN, SCALAR_HIDDEN))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x[..., -self.x_width :], y[..., -self.y_width :])

    def statistics(
        self,
        x: Tensor,
        y: Tensor,
        stats: Sequence[str] = ("positive", "row_lse"),
        pairs: str = "all",
        *,
        clip: float | None = None,
    ) -> Statistics:
        return self.network.statistics(x[..., -self.x_width :], y[..., -self.y_width :], stats, pairs, clip=clip)


class MeanCritic(InnerProductCritic):
    """The mean of the scores of several critics, computed from their concatenated features."""

    def __init__(self, critics: Sequence[InnerProductCritic]):
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def features(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        found = [critic.features(x, y) for critic in self.critics]  # type: ignore[operator]
        left = torch.cat([a * (scale / len(found)) for a, _, scale in found], -1)
        return left, torch.cat([b for _, b, _ in found], -1), 1.0
