"""Variational bounds whose negatives are the pairs off the diagonal: P is the joint, Q the product of the marginals.

E_P averages over the B pairs (x_i, y_i), E_Q over the B (B - 1) pairs (x_i, y_j) with i != j, so that no true pair is
in Q. All log-mean-exponentials stay in log space: scores of several hundred give finite values and gradients, an
exponential that the value itself contains (NWJ, TUBA, JS) being continued along its tangent past e^80 (e^700 in fp64).
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
    """log a(t) [*, B], 0 without a baseline."""
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
    """Lower bound 1 + E_P[T - log a] - E_Q[exp(T) / a]  (Poole et al. 2019, I_TUBA), tight at T = log(dP / dQ) + log a.

    `baseline` maps y [*, B, Dy] to log a(y), [*, B], [*, B, 1] or one number; a module is trained along. Without it
    a = 1. With `anchor="x"` it is a function of x.
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
    """E_P[T] - log E_Q[exp T]  (Donsker and Varadhan 1983; MINE, Belghazi et al. 2018), tight at T = log(dP / dQ) +
    any constant. The logarithm of a batch's mean makes it biased upwards: a bound in the limit of large B only,
    and not to be trusted above about log(B (B - 1))."""

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

    The gradient of log E_Q[exp T] has the batch's own mean as its denominator and is biased. In training mode it is
    grad E_Q[exp T] / A instead, A being an exponential moving average of E_Q[exp T] with factor `decay`, the batch
    included, starting at the first batch's. Every call in training mode updates A, as batch normalisation does; in
    evaluation mode value and gradient are Donsker-Varadhan's. `decay=0` is Donsker-Varadhan.

    log A is the buffer `log_average` ([*], NaN before the first batch): it is in the checkpoint, and large scores do
    not overflow it. A batch counts at most 1 / (1 - decay) times A, so that A at most doubles in a step: one outlier
    would otherwise silence the denominator until A has decayed, and the scores would grow without end. A batch whose
    mean is not finite leaves A as it was.
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
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes, and for other
        group dimensions than those that the moving average was started with."""
        positive, row_lse = self.off_diagonal(x, y, "positive", "row_lse")
        batch = x.shape[-2]
        log_mean = log_mean_exp(row_lse, batch * (batch - 1))
        value = positive.mean(-1) - log_mean
        if not self.training:
            return value
        weight = self._weight(log_mean.detach())
        return with_gradient_of(value, positive.mean(-1) - weight * (log_mean - log_mean.detach()).exp())

    def _weight(self, log_mean: Tensor) -> Tensor:
        """The batch's mean over the moving average, which takes it in."""
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
    """A critic trained by the Jensen-Shannon objective, valued by NWJ (Hjelm et al. 2019; Poole et al. 2019, I_JS).

    E_P[-softplus(-T)] - E_Q[softplus(T)] is the f-GAN dual of the Jensen-Shannon divergence; its optimum is T =
    log(dP / dQ). `learning_loss` is its negative, `divergence` the divergence that it estimates, and `forward` the
    mutual information at that critic: 1 + E_P[T] - E_Q[exp T], which is NWJ at T + 1 and a lower bound, with the
    gradient of the Jensen-Shannon objective. The public `js_lower_bound` takes NWJ at T itself, whose optimum lies one
    higher: at T = log(dP / dQ) that is 1 / e too low.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> nats [*]. Raises ValueError for other shapes."""
        positive, row_lse, row_softplus = self.off_diagonal(x, y, "positive", "row_lse", "row_softplus")
        batch = x.shape[-2]
        value = 1 + positive.mean(-1) - bounded_exp(log_mean_exp(row_lse, batch * (batch - 1)))
        return with_gradient_of(value, _js_objective(positive, row_softplus))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative Jensen-Shannon objective, [*]: the binary cross-entropy of telling P from Q, summed over
        both; 2 log 2 for a critic that is zero."""
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
    """Donsker-Varadhan with a clipped partition term, at a critic trained by Jensen-Shannon (Song and Ermon 2020):
    E_P[T] - log E_Q[exp clamp(T, -clip, clip)].

    As in the authors' code the value is that expression (E_P[T] is not clipped) and the gradient, of `forward` as of
    `learning_loss`, is the Jensen-Shannon objective's. Not a lower bound: it buys a bounded variance with
    a bias. `clip=math.inf` gives the Donsker-Varadhan value. Costs one more pass of scores for critics of inner
    products.
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
    """I_alpha: between TUBA (alpha = 0) and InfoNCE (alpha = 1)  (Poole et al. 2019, I_alpha).

    1 + E[T(x_1, y) - log(alpha m + (1 - alpha) a(y))] - E[exp(T(x_1, y)) / (alpha m + (1 - alpha) a(y))], where m is
    the mean of exp T(., y) over n candidates that include x_1, a true partner of y in the first expectation and a
    stranger in the second. A batch gives each y_i n = B - 1 strangers. They are the second term's candidates, and
    summed over x_1 it needs their mean alone: M / (alpha M + (1 - alpha) a) with M = mean_{j != i} exp T(x_j, y_i). In
    the first term the partner replaces one stranger; averaging over which one inside the logarithm, which by Jensen
    lowers the bound, leaves m = (exp T(x_i, y_i) + (n - 1) M) / n. So the log-sums of the columns suffice; the
    published notebook averages outside and needs every score. At most 1 + log((B - 1) / alpha).

    `baseline` as in `TUBA`; `anchor="x"` exchanges the roles of x and y.
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
