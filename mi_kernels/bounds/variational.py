"""Variational bounds on the KL divergence between the joint distribution P and the product of the marginals Q.

E_P averages over the B pairs (x_i, y_i), and E_Q over the B (B - 1) pairs (x_i, y_j) with i != j. Log-mean-exponentials
are computed in log space, so scores of several hundred give finite values and gradients. Where the value itself
contains an exponential (NWJ, TUBA, JS), it is continued by its tangent above e^80 (e^700 in fp64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..critics import Critic
from ..ops.common.checks import check_number
from .base import CriticBound, bounded_exp, check_anchor, log_mean_exp, with_gradient_of
from .registry import Ceiling, declare

Baseline = Callable[[Tensor], Tensor]


def check_baseline(baseline: Baseline | None) -> None:
    if baseline is not None and not callable(baseline):
        raise TypeError(f"baseline must map samples to log a, or be None, got {type(baseline).__name__}")


def _log_baseline(baseline: Baseline | None, t: Tensor, like: Tensor) -> Tensor:
    """log a(t), [*, B]; zeros if there is no baseline."""
    if baseline is None:
        return torch.zeros_like(like)
    value = baseline(t)
    if value.shape == (*like.shape, 1):
        value = value.squeeze(-1)
    if value.shape != like.shape and value.dim() != 0:
        raise ValueError(f"baseline must return {tuple(like.shape)} or one number, got {tuple(value.shape)}")
    return value.to(like.dtype).expand(like.shape)


@declare("tuba", kind="lower", value="1 + E_P[T - log a] - E_Q[exp(T) / a]", negatives="off the diagonal")
class TUBA(CriticBound):
    """Lower bound 1 + E_P[T - log a] - E_Q[exp(T) / a] (Poole et al. 2019, I_TUBA), tight at T = log(dP / dQ) + log a.

    baseline: maps y [*, B, Dy] to log a(y), [*, B], [*, B, 1] or one number; a module is trained together with the
        critic. None means a = 1.
    anchor: "y", or "x" for a baseline that is a function of x.
    """

    def __init__(self, critic: Critic, baseline: Baseline | None = None, anchor: str = "y"):
        super().__init__(critic)
        check_anchor(anchor)
        check_baseline(baseline)
        self.baseline = baseline
        self.anchor = anchor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        stat, t = ("col_lse", y) if self.anchor == "y" else ("row_lse", x)
        positive, log_sums = self.off_diagonal(x, y, "positive", stat)
        log_a = _log_baseline(self.baseline, t, positive)
        batch = x.shape[-2]
        product = log_mean_exp(log_sums - log_a, batch * (batch - 1))
        return 1 + (positive - log_a).mean(-1) - bounded_exp(product)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y)

    def extra_repr(self) -> str:
        return f"anchor={self.anchor!r}"


@declare("nwj", kind="lower", value="E_P[T] - E_Q[exp(T - 1)]", negatives="off the diagonal")
class NWJ(CriticBound):
    """Lower bound E_P[T] - E_Q[exp(T - 1)]  (Nguyen, Wainwright and Jordan 2010; Poole et al. 2019, I_NWJ), tight at
    T = 1 + log(dP / dQ): TUBA with log a = 1. Its variance grows as e^I (Song and Ermon 2020)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        positive, row_lse = self.off_diagonal(x, y, "positive", "row_lse")
        batch = x.shape[-2]
        return positive.mean(-1) - bounded_exp(log_mean_exp(row_lse, batch * (batch - 1)) - 1)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y)


@declare("dv", kind="lower", value="E_P[T] - log E_Q[exp T], in the limit of large n", negatives="off the diagonal")
class DonskerVaradhan(CriticBound):
    """E_P[T] - log E_Q[exp T] (Donsker and Varadhan 1983; MINE, Belghazi et al. 2018), tight at T = log(dP / dQ) plus
    any constant. The logarithm of a batch mean biases the value upwards, so it is a lower bound only in the limit of
    large B. Do not rely on values above about log(B (B - 1))."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        positive, row_lse = self.off_diagonal(x, y, "positive", "row_lse")
        batch = x.shape[-2]
        return positive.mean(-1) - log_mean_exp(row_lse, batch * (batch - 1))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y)


@declare("mine", kind="lower", value="as `dv`, trained with an averaged denominator", negatives="off the diagonal")
class MINE(CriticBound):
    """Donsker-Varadhan whose gradient divides by a moving average (Belghazi et al. 2018, section 3.2).

    The gradient of log E_Q[exp T] divides by the mean of the batch, which biases it. In training mode this class uses
    grad E_Q[exp T] / A instead. A is an exponential moving average of E_Q[exp T] with factor `decay`, which includes
    the current batch and starts with the first batch. Every call in training mode updates A, as in batch normalisation.
    In evaluation mode, and with `decay=0`, value and gradient equal those of Donsker-Varadhan.

    The buffer `log_average` holds log A ([*], NaN before the first batch). It is part of the checkpoint, and large
    scores do not overflow it. A batch contributes at most A / (1 - decay), so A at most doubles in one step. Otherwise
    a single outlier would suppress the gradient of the denominator until A has decayed, and scores would grow without
    limit. A batch whose mean is not finite leaves A unchanged.
    """

    log_average: Tensor

    def __init__(self, critic: Critic, decay: float = 0.99):
        super().__init__(critic)
        check_number("decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("log_average", torch.tensor(math.nan))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes, and if the group
        dimensions differ from those of the moving average."""
        positive, row_lse = self.off_diagonal(x, y, "positive", "row_lse")
        batch = x.shape[-2]
        log_mean = log_mean_exp(row_lse, batch * (batch - 1))
        value = positive.mean(-1) - log_mean
        if not self.training:
            return value
        weight = self._weight(log_mean.detach())
        return with_gradient_of(value, positive.mean(-1) - weight * (log_mean - log_mean.detach()).exp())

    def _weight(self, log_mean: Tensor) -> Tensor:
        """Updates the moving average with the batch and returns the batch mean divided by it."""
        average = self.log_average.to(log_mean)
        if average.dim() == 0:
            average = average.expand(log_mean.shape)
        if average.shape != log_mean.shape:
            raise ValueError(
                f"x must have the group dimensions of the moving average, {tuple(average.shape)}, "
                f"got {tuple(log_mean.shape)}"
            )
        counted = torch.where(average.isnan(), log_mean, log_mean.minimum(average - math.log1p(-self.decay)))
        if self.decay:
            blended = torch.logaddexp(average + math.log(self.decay), counted + math.log1p(-self.decay))
        else:
            blended = counted = log_mean
        updated = torch.where(average.isnan(), log_mean, blended)
        updated = torch.where(log_mean.isfinite(), updated, average)
        if (self.log_average.shape, self.log_average.dtype) == (updated.shape, updated.dtype):
            self.log_average.copy_(updated)
        else:
            self.log_average = updated
        return (counted - torch.where(updated.isnan(), log_mean, updated)).exp()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}log_average")
        if stored is not None:
            self.log_average = torch.empty_like(stored, device=self.log_average.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


def _js_objective(positive: Tensor, row_softplus: Tensor) -> Tensor:
    """E_P[-softplus(-T)] - E_Q[softplus(T)], at most 0."""
    return F.logsigmoid(positive).mean(-1) - row_softplus.mean(-1) / (positive.shape[-1] - 1)


@declare("js", kind="lower", value="NWJ at T + 1, T trained by Jensen-Shannon", negatives="off the diagonal")
class JensenShannon(CriticBound):
    """A critic trained by the Jensen-Shannon objective and evaluated by NWJ (Hjelm et al. 2019; Poole et al. 2019,
    I_JS).

    The objective E_P[-softplus(-T)] - E_Q[softplus(T)] is the f-GAN dual of the Jensen-Shannon divergence; its optimum
    is T = log(dP / dQ). `learning_loss` is its negative, and `divergence` is the divergence that it estimates.
    `forward` returns the lower bound 1 + E_P[T] - E_Q[exp T] of mutual information, which is NWJ at T + 1, with the
    gradient of the Jensen-Shannon objective. The public `js_lower_bound` evaluates NWJ at T instead of T + 1; at the
    optimal critic its value is 1 / e too low.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        positive, row_lse, row_softplus = self.off_diagonal(x, y, "positive", "row_lse", "row_softplus")
        batch = x.shape[-2]
        value = 1 + positive.mean(-1) - bounded_exp(log_mean_exp(row_lse, batch * (batch - 1)))
        return with_gradient_of(value, _js_objective(positive, row_softplus))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative Jensen-Shannon objective, [*]: the sum of the binary cross-entropies on P and on Q; 2 log 2 for
        a critic that is zero."""
        return -_js_objective(*self.off_diagonal(x, y, "positive", "row_softplus"))

    def divergence(self, x: Tensor, y: Tensor) -> Tensor:
        """A lower bound on the Jensen-Shannon divergence of P and Q, at most log 2 nats: [*]."""
        return math.log(2) - self.learning_loss(x, y) / 2


@declare(
    "smile",
    kind="neither",
    value="E_P[T] - log E_Q[exp clamp(T, -clip, clip)]",
    negatives="off the diagonal",
    trained_by="js",
)
class SMILE(CriticBound):
    """Donsker-Varadhan with a clipped partition function, for a critic trained by the Jensen-Shannon objective (Song
    and Ermon 2020): E_P[T] - log E_Q[exp clamp(T, -clip, clip)].

    As in the authors' code, E_P[T] is not clipped, and the gradient of both `forward` and `learning_loss` is that of
    the Jensen-Shannon objective. SMILE is not a lower bound: clipping limits the variance and adds a bias.
    `clip=math.inf` gives the Donsker-Varadhan value. With inner-product critics it costs one more pass over the scores.
    """

    def __init__(self, critic: Critic, clip: float = 5.0):
        super().__init__(critic)
        check_number("clip", clip, positive=True, infinite=True)
        self.clip = float(clip)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        stats = ("positive", "clipped_row_lse", "row_softplus")
        positive, clipped, row_softplus = self.off_diagonal(x, y, *stats, clip=self.clip)
        batch = x.shape[-2]
        value = positive.mean(-1) - log_mean_exp(clipped, batch * (batch - 1))
        return with_gradient_of(value, _js_objective(positive, row_softplus))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative Jensen-Shannon objective, [*]; see `JensenShannon`."""
        return -_js_objective(*self.off_diagonal(x, y, "positive", "row_softplus"))

    def extra_repr(self) -> str:
        return f"clip={self.clip}"


@declare(
    "interpolated",
    kind="lower",
    value="between TUBA (alpha = 0) and InfoNCE (alpha = 1)",
    negatives="off the diagonal",
    # at the default alpha, 1 / 2
    ceiling=Ceiling("1 + log(2 (n - 1))", lambda n: 1 + math.log(2 * (n - 1))),
)
class InterpolatedBound(CriticBound):
    """Lower bound that interpolates between TUBA (alpha = 0) and InfoNCE (alpha = 1) (Poole et al. 2019, I_alpha):

        1 + E[T(x_1, y) - log(alpha m + (1 - alpha) a(y))] - E[exp(T(x_1, y)) / (alpha m + (1 - alpha) a(y))]

    m is the mean of exp T(., y) over n candidates that include x_1. In the first expectation x_1 is the positive of y,
    in the second it is a negative. At most 1 + log((B - 1) / alpha) nats.

    Each y_i has n = B - 1 negatives in the batch. The second term uses them as candidates; summed over x_1 it depends
    only on their mean M = mean_{j != i} exp T(x_j, y_i) and equals M / (alpha M + (1 - alpha) a). In the first term the
    positive replaces one negative. We average over the replaced negative inside the logarithm, which gives
    m = (exp T(x_i, y_i) + (n - 1) M) / n and by Jensen's inequality a lower value. The log-sum-exps of the columns are
    then sufficient. The published notebook averages outside the logarithm and needs all scores.

    alpha: in [0, 1].
    baseline: as in `TUBA`.
    anchor: "x" exchanges the roles of x and y.
    """

    def __init__(self, critic: Critic, alpha: float = 0.5, baseline: Baseline | None = None, anchor: str = "y"):
        super().__init__(critic)
        check_anchor(anchor)
        check_number("alpha", alpha)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        self.alpha = alpha
        self.baseline = baseline
        self.anchor = anchor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        stat, t = ("col_lse", y) if self.anchor == "y" else ("row_lse", x)
        positive, log_sums = self.off_diagonal(x, y, "positive", stat)
        log_a = _log_baseline(self.baseline, t, positive)
        strangers = x.shape[-2] - 1
        log_m = log_sums - math.log(strangers)
        with_partner = torch.logaddexp(positive, log_m + _log(strangers - 1)) - math.log(strangers)
        joint = positive - self._blend(with_partner, log_a)
        product = bounded_exp(log_m - self._blend(log_m, log_a))
        return 1 + joint.mean(-1) - product.mean(-1)

    def _blend(self, log_m: Tensor, log_a: Tensor) -> Tensor:
        return torch.logaddexp(log_m + _log(self.alpha), log_a + _log(1 - self.alpha))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, anchor={self.anchor!r}"


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
