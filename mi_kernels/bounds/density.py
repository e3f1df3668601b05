"""A learned conditional density q(y | x), and bounds that use it.

`bound(x, y)` returns the value in nats, [*]; `bound.learning_loss(x, y)` is the negative log-likelihood, which trains
q. The upper bounds hold only if q fits. Alternate training steps of q with steps on the bound, and use held-out samples
for estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..critics import GroupedLinear
from ..critics.base import check_as_network
from ..ops.common import checks
from ..ops.common.precision import outside_autocast
from ..ops.common.rows import widened
from ..ops.dot_critic import api as dot_critic
from .registry import declare

LOGVAR_BOUND = 6.0


def check_samples(name: str, t: Tensor, width: int) -> None:
    """Raises TypeError or ValueError unless t is a non-empty floating-point tensor [*, batch, width]."""
    if isinstance(t, Tensor) and (t.dim() < 2 or t.shape[-1] != width or t.numel() == 0):
        raise ValueError(f"{name} must be [*, batch, {width}] and not empty, got {tuple(t.shape)}")
    checks.check_samples(name, t)


def check_widths(**widths: int | None) -> None:
    for name, width in widths.items():
        if width is not None:
            checks.check_integer(name, width, 1)


def network(in_dim: int, hidden_dim: int | None, out_dim: int, groups: int | None) -> nn.Module:
    """Linear-ReLU-Linear, or one linear map if `hidden_dim` is None; `groups` independent copies if given."""

    def linear(i: int, o: int) -> nn.Module:
        return nn.Linear(i, o) if groups is None else GroupedLinear(groups, i, o)

    if hidden_dim is None:
        return linear(in_dim, out_dim)
    return nn.Sequential(linear(in_dim, hidden_dim), nn.ReLU(), linear(hidden_dim, out_dim))


class GaussianConditional(nn.Module):
    """q(y | x) = N(mu(x), diag exp logvar(x)); both networks are Linear-ReLU-Linear of width `hidden_dim`.

    x_dim, y_dim: widths of x [*, B, x_dim] and y [*, B, y_dim].
    hidden_dim: the hidden width. CLUB's public code uses half of the width that it is given.
    logvar_bound: b in logvar = b tanh(raw / b), or None for no bound. The default allows variances from e^-6 to e^6,
        enough for 3 nats per dimension. CLUB's public code has b = 1; its smallest variance 1/e limits q to half a nat
        per dimension.
    groups: if given, G independent networks; parameters get a leading dimension G, and inputs are [G, B, .].

    The networks cost 4 B (x_dim + y_dim) hidden_dim FLOP forward and twice that backward.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden_dim: int,
        *,
        logvar_bound: float | None = LOGVAR_BOUND,
        groups: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        check_widths(x_dim=x_dim, y_dim=y_dim, hidden_dim=hidden_dim, groups=groups)
        if logvar_bound is not None:
            checks.check_number("logvar_bound", logvar_bound, positive=True)
        self.x_dim, self.y_dim, self.logvar_bound, self.backend = x_dim, y_dim, logvar_bound, backend
        self.p_mu = network(x_dim, hidden_dim, y_dim, groups)
        self.p_logvar = network(x_dim, hidden_dim, y_dim, groups)

    def get_mu_logvar(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of q(y | x), both [*, B, y_dim]."""
        check_samples("x", x, self.x_dim)
        check_as_network("x", x, self.p_mu)
        logvar, bound = self.p_logvar(x), self.logvar_bound
        return self.p_mu(x), logvar if bound is None else bound * torch.tanh(logvar / bound)

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log q(y_i | x_i), [*, B], in nats."""
        self._check(x, y)
        mu, logvar = self.get_mu_logvar(x)
        mu, logvar, y = widened(mu), widened(logvar), widened(y)
        terms = (y - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)
        return -0.5 * terms.sum(-1)

    def loglikeli(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean log q(y_i | x_i), [*], in nats. The public code omits the factor 1/2 and the constant: its value is
        2 loglikeli + y_dim log 2 pi. With plain SGD, the same learning rate therefore gives half the step here."""
        return self.log_density(x, y).mean(-1)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss that fits q: the negative log-likelihood, [*]."""
        return -self.loglikeli(x, y)

    def _check(self, x: Tensor, y: Tensor) -> None:
        check_samples("x", x, self.x_dim)
        check_samples("y", y, self.y_dim)
        if x.device != y.device:
            raise ValueError(f"y is on {y.device}, x is on {x.device}")
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"y must have the batch dimensions of x, {tuple(x.shape[:-1])}, got {tuple(y.shape[:-1])}")

    def extra_repr(self) -> str:
        return f"x_dim={self.x_dim}, y_dim={self.y_dim}, logvar_bound={self.logvar_bound}"


@declare(
    "leave_one_out",
    kind="upper",
    value="mean_i log q(y_i given x_i) - mean_i log mean_{j != i} q(y_i given x_j)",
    negatives="off the diagonal",
    critics=("density",),
)
class LeaveOneOut(GaussianConditional):
    """Upper bound mean_i [log q(y_i | x_i) - log mean_{j != i} q(y_i | x_j)] (Poole et al. 2019, section 2, with a
    learned conditional as in Cheng et al. 2020). By Jensen's inequality it is never above CLUB over the same pairs.

    CLUB's public `L1OutUB` computes something else: its mask of shape [B, B, 1] broadcasts the [B, B] densities to
    [B, B, B], and the log-sum-exp becomes a plain mean, so it returns CLUB's value. Here the log-sum-exp over j
    excludes the diagonal.

    The log densities of all pairs are inner products of 2 D features and are not stored: 8 B^2 D FLOP forward, 24 B^2 D
    backward, O(B D) memory. Both sides are centred on the mean of y first; the rounding error is that of an fp32
    product of size sum_d (mu^2 + y^2) / variance. With matmul precision "medium" the products are bf16 and the value is
    imprecise.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, x_dim], y [*, B, y_dim], B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        self._check(x, y)
        batch = x.shape[-2]
        if batch < 2:
            raise ValueError(f"x must hold at least 2 samples for leave-one-out, got x {tuple(x.shape)}")
        mu, logvar = self.get_mu_logvar(x)
        mu, logvar, y = widened(mu), widened(logvar), widened(y)
        centre = y.mean(-2, keepdim=True).detach()
        m, c, w = mu - centre, y - centre, (-logvar).exp()
        own = -0.5 * ((c - m).square() * w + logvar).sum(-1)
        found = dot_critic.statistics(
            torch.cat([-0.5 * w, w * m], -1),
            torch.cat([c.square(), c], -1),
            row_bias=-0.5 * (w * m.square() + logvar).sum(-1),
            pairs="off_diagonal",
            stats=("col_lse",),
            backend=self.backend,
        ).col_lse
        assert found is not None
        return (own - found).mean(-1) + math.log(batch - 1)


@declare(
    "variational_upper_bound",
    kind="upper",
    value="mean_i KL(q(y given x_i) to N(0, I))",
    negatives="none",
    critics=("density",),
)
class VariationalUpperBound(GaussianConditional):
    """Upper bound mean_i KL(q(y | x_i) || N(0, I)) (Alemi et al. 2017: the rate of the information bottleneck).

    The KL divergence is summed over dimensions. CLUB's public `VarUB` averages over them, which divides the KL by
    y_dim, so for y_dim > 1 it is not an upper bound. The value does not depend on y; `forward` accepts y for a uniform
    interface.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, x_dim], y [*, B, y_dim] -> nats [*]. Raises ValueError for other shapes."""
        self._check(x, y)
        mu, logvar = (widened(t) for t in self.get_mu_logvar(x))
        return 0.5 * (mu.square() + torch.expm1(logvar) - logvar).sum(-1).mean(-1)


@outside_autocast  # the determinant has no 16-bit form
def gaussian_entropy(y: Tensor) -> Tensor:
    """Entropy in nats, [*], of samples y [*, B, D] under a Gaussian model; unbiased if y is Gaussian.

    This is 1/2 log det(2 pi e S) with the sample covariance S, minus half the expectation of log(det S / det Sigma)
    under the Wishart distribution, sum_{k < D} digamma((B - 1 - k) / 2) + D log(2 / (B - 1)). Raises ValueError if B <=
    D.
    """
    batch, depth = y.shape[-2:]
    if batch <= depth:
        raise ValueError(f"the entropy of y needs more samples than dimensions, got y {tuple(y.shape)}; pass entropy")
    y = widened(y)
    c = y - y.mean(-2, keepdim=True)
    log_det = torch.linalg.slogdet(c.mT @ c / (batch - 1)).logabsdet
    halves = (batch - 1 - torch.arange(depth, dtype=torch.float64)) / 2
    bias = torch.digamma(halves).sum() + depth * math.log(2 / (batch - 1))
    return 0.5 * (log_det - bias.to(log_det) + depth * math.log(2 * math.pi * math.e))


@declare(
    "barber_agakov",
    kind="lower",
    value="mean_i log q(y_i given x_i) + H(y)",
    negatives="none",
    critics=("density",),
)
class BarberAgakov(GaussianConditional):
    """Lower bound mean_i log q(y_i | x_i) + H(y) (Barber and Agakov 2003).

    `entropy` is H(y) in nats: a number, a tensor [*], or a callable y -> [*]. If it is None, H is estimated as if y
    were Gaussian (`gaussian_entropy`). A Gaussian has the largest entropy for a given covariance, so for other
    distributions the value may then exceed I(x; y). It is a lower bound only if H is at most the true entropy. Fitting
    q does not need H.
    """

    def forward(
        self, x: Tensor, y: Tensor, entropy: float | Tensor | Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x [*, B, x_dim], y [*, B, y_dim] -> nats [*]. Raises ValueError for other shapes."""
        found = self.loglikeli(x, y)
        if entropy is None:
            entropy = gaussian_entropy
        h = entropy(y) if callable(entropy) else entropy
        if isinstance(h, Tensor):
            if h.numel() != 1 and h.shape != found.shape:
                raise ValueError(f"entropy must be a number or have shape {tuple(found.shape)}, got {tuple(h.shape)}")
            if h.is_complex():
                raise TypeError(f"entropy must be real, got {h.dtype}")
        else:
            checks.check_number("entropy", h)
        return found + h
