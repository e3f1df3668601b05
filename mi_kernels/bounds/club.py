"""CLUB and its variants: upper bounds mean_i log q(y_i | x_i) - mean_ij log q(y_j | x_i) (Cheng et al. 2020).

`bound(x, y)` returns the value in nats, [*]; `bound.learning_loss(x, y)` is the loss that fits q(y | x). With the true
conditional the expectation is I + KL(p(x) p(y) || p(x, y)). With a learned q it is an upper bound if q is closer to
p(x, y) than to p(x) p(y); before that it may be negative. Every variant costs O(B D), because no pairs are formed.

`negatives="all"` averages over all j, as in the paper's sums and public code. The terms j = i are zero, so the
expectation is (B - 1) / B times the bound. "others" excludes j = i, which removes that factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..critics.base import check_as_network
from ..ops.club.api import NEGATIVES, gaussian_club
from ..ops.common.autograd import readable
from ..ops.common.checks import check_choice, check_tensor
from ..ops.common.rows import widened
from .density import LOGVAR_BOUND, GaussianConditional, check_samples, check_widths, network
from .registry import declare


def _check_two(x: Tensor) -> None:
    if x.shape[-2] < 2:
        raise ValueError(f"negatives='others' needs at least two samples, got x {tuple(x.shape)}")


@declare(
    "club",
    kind="upper",
    value="mean_i log q(y_i given x_i) - mean_ij log q(y_j given x_i), q Gaussian",
    negatives="all pairs",
    critics=("density",),
)
class CLUB(GaussianConditional):
    """vCLUB with a Gaussian q: the exact mean over all pairs in closed form (Cheng et al. 2020, arXiv 2006.12013).

    Cost in addition to the networks: about 15 B y_dim FLOP forward and 30 B y_dim backward, each in one pass over
    memory. The public code stores B x B x y_dim numbers for the same value. `GaussianConditional` describes the
    arguments, the networks and their differences from the public code.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden_dim: int,
        *,
        negatives: str = "all",
        logvar_bound: float | None = LOGVAR_BOUND,
        groups: int | None = None,
        backend: str | None = None,
    ):
        super().__init__(x_dim, y_dim, hidden_dim, logvar_bound=logvar_bound, groups=groups, backend=backend)
        check_choice("negatives", negatives, NEGATIVES)
        self.negatives = negatives

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, x_dim], y [*, B, y_dim] -> nats [*]. Raises ValueError for other shapes."""
        self._check(x, y)
        mu, logvar = self.get_mu_logvar(x)
        return gaussian_club(mu, logvar, y, negatives=self.negatives, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negatives={self.negatives!r}"


def _partners(shape: torch.Size, negatives: str, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """The index of the negative of every sample, [*, B], drawn independently in every group."""
    if generator is None:  # torch.compile does not accept generator=None together with a symbolic shape
        order = torch.rand(shape, device=device).argsort(-1)
    else:
        order = torch.rand(shape, device=generator.device, generator=generator).argsort(-1).to(device)
    if negatives == "all":
        return order
    # order_k -> order_k+1 is one random cycle: no sample is its own negative, and all other indices are equally likely
    return torch.empty_like(order).scatter_(-1, order, order.roll(-1, -1))


@declare(
    "club_sample",
    kind="upper",
    value="as `club`, one negative a sample",
    negatives="all pairs",
    critics=("density",),
)
class CLUBSample(CLUB):
    """vCLUB-S: one negative y per x instead of all (Cheng et al. 2020). Same expectation as CLUB, more variance.

    With `negatives="all"` the negatives are a random permutation of the batch, which may pair a sample with itself, as
    in the public code. With "others" they are a random cyclic shift of a random order, which never does. Pass
    `generator` for repeatable draws. `CLUB` costs the same in this package; this variant exists for comparisons with
    published results.
    """

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x [*, B, x_dim], y [*, B, y_dim] -> nats [*]. Raises ValueError for other shapes."""
        self._check(x, y)
        if self.negatives == "others":
            _check_two(x)
        mu, logvar = (widened(t) for t in self.get_mu_logvar(x))
        y = widened(y)
        partner = _partners(x.shape[:-1], self.negatives, x.device, generator)
        other = y.gather(-2, partner.unsqueeze(-1).expand_as(y))
        # equals (other - mu)^2 - (y - mu)^2, but avoids the difference of two large squares
        terms = (other - y) * ((other - mu) + (y - mu)) * (-logvar).exp()
        return 0.5 * terms.sum(-1).mean(-1)


@declare(
    "club_mean",
    kind="upper",
    value="as `club`, q of unit variance",
    negatives="all pairs",
    critics=("density",),
)
class CLUBMean(GaussianConditional):
    """CLUB with unit variances, q(y | x) = N(mu(x), I). According to its authors it is less flexible and trains more
    stably.

    mu is Linear-ReLU-Linear, or one linear map if `hidden_dim` is None, as in the public code. `loglikeli` is the
    complete log-likelihood; the public code omits the factor 1/2 and the constant.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden_dim: int | None = None,
        *,
        negatives: str = "all",
        groups: int | None = None,
        backend: str | None = None,
    ):
        nn.Module.__init__(self)
        check_widths(x_dim=x_dim, y_dim=y_dim, hidden_dim=hidden_dim, groups=groups)
        check_choice("negatives", negatives, NEGATIVES)
        self.x_dim, self.y_dim, self.logvar_bound, self.backend = x_dim, y_dim, None, backend
        self.negatives = negatives
        self.p_mu = network(x_dim, hidden_dim, y_dim, groups)

    def get_mu_logvar(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the means of q(y | x), [*, B, y_dim], and log-variances, which are all zero."""
        check_samples("x", x, self.x_dim)
        mu = self._mu(x)
        return mu, torch.zeros_like(mu)

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log q(y_i | x_i), [*, B], in nats."""
        self._check(x, y)
        distance = (widened(y) - widened(self._mu(x))).square().sum(-1)
        return -0.5 * (distance + self.y_dim * math.log(2 * math.pi))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, x_dim], y [*, B, y_dim] -> nats [*]. Raises ValueError for other shapes."""
        self._check(x, y)
        return gaussian_club(self._mu(x), None, y, negatives=self.negatives, backend=self.backend)

    def _mu(self, x: Tensor) -> Tensor:
        check_as_network("x", x, self.p_mu)
        mu: Tensor = self.p_mu(x)
        return mu

    def extra_repr(self) -> str:
        return f"x_dim={self.x_dim}, y_dim={self.y_dim}, negatives={self.negatives!r}"


@declare(
    "club_categorical",
    kind="upper",
    value="as `club`, q a softmax",
    negatives="all pairs",
    critics=("density",),
)
class CLUBCategorical(nn.Module):
    """CLUB for a discrete y: q(y | x) is the softmax of a linear map, or of Linear-ReLU-Linear if `hidden_dim` is
    given.

    x [*, B, x_dim], labels [*, B] integers in [0, num_classes). With logits z and label frequencies p the value is
    mean_i z_i,label(i) - mean_i sum_c p_c z_ic, because the normaliser of the softmax cancels. This takes B num_classes
    numbers of memory; the public code repeats the logits to B x B x num_classes.
    """

    def __init__(
        self,
        x_dim: int,
        num_classes: int,
        hidden_dim: int | None = None,
        *,
        negatives: str = "all",
        groups: int | None = None,
    ):
        super().__init__()
        check_widths(x_dim=x_dim, num_classes=num_classes, hidden_dim=hidden_dim, groups=groups)
        check_choice("negatives", negatives, NEGATIVES)
        self.x_dim, self.num_classes, self.negatives = x_dim, num_classes, negatives
        self.variational_net = network(x_dim, hidden_dim, num_classes, groups)

    def _logits(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Checks the inputs; returns logits [*, B, C] and labels as indices [*, B, 1]."""
        check_samples("x", x, self.x_dim)
        check_as_network("x", x, self.variational_net)
        check_tensor("labels", labels)
        if labels.is_floating_point() or labels.is_complex() or labels.shape != x.shape[:-1]:
            given = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels must be integers of shape {tuple(x.shape[:-1])}, got {given}")
        if labels.device != x.device:
            raise ValueError(f"labels are on {labels.device}, x is on {x.device}")
        if readable(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"labels must lie in [0, {self.num_classes}), got {low} to {high}")
        return widened(self.variational_net(x)), labels.long().unsqueeze(-1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x [*, B, x_dim], labels [*, B] -> nats [*]. Raises ValueError for other shapes or labels out of range."""
        logits, index = self._logits(x, labels)
        batch = x.shape[-2]
        frequency = torch.zeros_like(logits[..., 0, :]).scatter_add(
            -1, index.squeeze(-1), torch.full_like(logits[..., 0], 1 / batch)
        )
        own = logits.gather(-1, index).squeeze(-1).mean(-1)
        value = own - (logits.mean(-2) * frequency).sum(-1)
        if self.negatives == "others":
            _check_two(x)
            return value * (batch / (batch - 1))
        return value

    def loglikeli(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean log q(label_i | x_i), [*], in nats."""
        logits, index = self._logits(x, labels)
        return logits.log_softmax(-1).gather(-1, index).squeeze(-1).mean(-1)

    def learning_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss that fits q: the cross-entropy, [*]."""
        return -self.loglikeli(x, labels)

    def extra_repr(self) -> str:
        return f"x_dim={self.x_dim}, num_classes={self.num_classes}, negatives={self.negatives!r}"
