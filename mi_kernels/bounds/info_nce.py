"""InfoNCE and NCE-CLUB. Both average over all pairs of the batch, including the diagonal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..critics import Critic
from ..ops.common.checks import check_choice, check_tensor
from .base import CriticBound, check_anchor, check_paired
from .conditional import StatisticsOf, within_labels
from .registry import Ceiling, declare

CONDITIONS = ("concat", "group")


def _with_condition(x: Tensor, y: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("condition", condition)
    for name, t in (("x", x), ("y", y)):
        if condition.shape[:-1] != t.shape[:-1]:
            raise ValueError(
                f"condition must be [*, B, C] with the batch dimensions of {name}, {tuple(t.shape[:-1])}, "
                f"got {tuple(condition.shape)}"
            )
    return torch.cat([x, condition.to(x.dtype)], -1), torch.cat([y, condition.to(y.dtype)], -1)


class _Contrastive(CriticBound):
    """`anchor="x"` compares every x_i with all y_j, as in the papers; `anchor="y"` compares every y_j with all x_i, as
    in FactorCL's public code. `condition` defines how the third argument of a call is used."""

    def __init__(self, critic: Critic, anchor: str = "x", condition: str = "concat"):
        super().__init__(critic)
        check_anchor(anchor)
        check_choice("condition", condition, CONDITIONS)
        self.anchor = anchor
        self.condition = condition

    def _mean(self, terms: Any, x: Tensor, y: Tensor, condition: Tensor | None) -> Tensor:
        """The mean over the batch of terms(statistics, x, y) [*, B], given the condition."""
        check_paired(x, y)
        if condition is not None and self.condition == "group":
            return within_labels(self.critic, terms, x, y, condition)
        if condition is not None:
            x, y = _with_condition(x, y, condition)
        found: Tensor = terms(self.critic.statistics, x, y)
        return found.mean(-1)

    def _info_nce(self, statistics: StatisticsOf, x: Tensor, y: Tensor) -> Tensor:
        log_sum = "row_lse" if self.anchor == "x" else "col_lse"
        found = statistics(x, y, stats=("positive", log_sum))._asdict()
        gap: Tensor = found["positive"] - found[log_sum]
        return gap + math.log(x.shape[-2])

    def extra_repr(self) -> str:
        return f"anchor={self.anchor!r}, condition={self.condition!r}"


class SymmetricInfoNCE(CriticBound):
    """The mean of InfoNCE with x and with y as the anchor, in one pass over the scores. At most log B nats. This is the
    default objective of `estimate_mi`."""

    def contributions(self, x: Tensor, y: Tensor) -> Tensor:
        """One contribution per sample, [*, B]; their mean is the value."""
        found = self.critic.statistics(x, y, stats=("positive", "row_lse", "col_lse"))
        assert found.positive is not None and found.row_lse is not None and found.col_lse is not None
        gap: Tensor = found.positive - (found.row_lse + found.col_lse) / 2
        return gap + math.log(x.shape[-2])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] -> nats [*]. Raises ValueError for other shapes."""
        check_paired(x, y)
        return self.contributions(x, y).mean(-1)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y)


@declare(
    "infonce",
    kind="lower",
    value="mean_i S[i, i] - mean_i log mean_j exp S[i, j]",
    negatives="all pairs",
    ceiling=Ceiling("log n", math.log),
    estimator=SymmetricInfoNCE,
)
class InfoNCE(_Contrastive):
    """Lower bound mean_i S[i, i] - mean_i log sum_j exp S[i, j] + log B (van den Oord et al. 2018; FactorCL, arXiv
    2306.05268, eq. 10). At most log B nats.

    critic: scores S[i, j] of x_i and y_j.
    anchor: "x" compares every x_i with all y_j, as in the papers; "y" compares every y_j with all x_i, as in FactorCL's
        public code.
    condition: how the optional third argument of a call is used, "concat" or "group".

    With `condition="concat"` the condition [*, B, C] is concatenated to x and to y, so the critic must accept x_dim + C
    and y_dim + C. Negatives come from the whole batch, as in FactorCL's code. For a discrete C this estimates
    I((X, C); (Y, C)) = H(C) + I(X; Y | C), not I(X; Y | C) itself.

    With `condition="group"` the condition holds integer labels, [*, B] or [*, B, 1], and negatives come from the
    samples with the same label. This estimates I(X; Y | C) (eq. 13) and is at most the mean log size of the groups. All
    groups of the same size share one call of the critic, so the cost is that of sum_c n_c^2 pairs instead of B^2.
    Reading the group sizes synchronises with a GPU and cannot be captured in a CUDA graph. The critic sees only x and
    y; append the label to x if the critic should depend on it.
    """

    def forward(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] -> nats [*]. Raises ValueError for other shapes."""
        return self._mean(self._info_nce, x, y, condition)

    def learning_loss(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y, condition)


@declare(
    "nce_club",
    kind="upper",
    value="mean_i S[i, i] - mean_ij S[i, j]",
    negatives="all pairs",
    trained_by="infonce",
)
class NCECLUB(_Contrastive):
    """Upper bound mean_i S[i, i] - mean_{i, j} S[i, j] with a critic that is trained by InfoNCE (FactorCL, arXiv
    2306.05268, eq. 11 and Theorem 2). The second mean includes the diagonal, as in FactorCL's public code.

    It is an upper bound only for the optimal critic. With the exact log density ratio its expectation is
    (B - 1) / B (I + KL(p(x) p(y) || p(x, y))). `anchor` is the direction of the InfoNCE loss that trains the critic.
    `condition` is as in `InfoNCE` (eq. 14 for "group"). The value needs no exponentials; with an inner-product critic
    it costs O(B D).
    """

    def forward(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] -> nats [*]. Raises ValueError for other shapes."""
        return self._mean(self._club, x, y, condition)

    def _club(self, statistics: StatisticsOf, x: Tensor, y: Tensor) -> Tensor:
        found = statistics(x, y, stats=("positive", "row_sum"))._asdict()
        gap: Tensor = found["positive"] - found["row_sum"] / x.shape[-2]
        return gap

    def learning_loss(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """The loss that trains the critic: the negative InfoNCE bound, [*]."""
        return -self._mean(self._info_nce, x, y, condition)
