"""InfoNCE, and NCE-CLUB on it: negatives are all pairs of the batch, the diagonal included."""

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
    """`anchor="x"` contrasts every x_i with all y_j, as the papers write it; `anchor="y"` contrasts every y_j with all
    x_i, which is what FactorCL's public code computes. `condition` says what the third argument of a call does."""

    def __init__(self, critic: Critic, anchor: str = "x", condition: str = "concat"):
        super().__init__(critic)
        check_anchor(anchor)
        check_choice("condition", condition, CONDITIONS)
        self.anchor = anchor
        self.condition = condition

    def _mean(self, terms: Any, x: Tensor, y: Tensor, condition: Tensor | None) -> Tensor:
        """The mean of terms(statistics, x, y) [*, B] over the batch, conditioned."""
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
    """The mean of InfoNCE with x and with y as the anchor: at most log B, one pass over the scores. What `estimate_mi`
    fits by default."""

    def contributions(self, x: Tensor, y: Tensor) -> Tensor:
        """One per sample, [*, B], whose mean is the value."""
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
    """Lower bound: mean_i S[i, i] - mean_i log sum_j exp S[i, j] + log B  (van den Oord et al. 2018;
    FactorCL, arXiv 2306.05268, eq. 10). At most log B.

    `anchor="x"` contrasts every x_i with all y_j, as the papers write it; `anchor="y"` contrasts every y_j
    with all x_i, which is what FactorCL's public code computes.

    Conditional on C, with `condition="concat"`: the condition [*, B, C] is concatenated to both sides, so the critic
    must take x_dim + C and y_dim + C. The negatives stay unconditional, as in FactorCL's code: the estimate is of
    I((X, C); (Y, C)) = H(C) + I(X; Y | C) for a discrete C, not of I(X; Y | C) itself.

    With `condition="group"` the condition holds integer labels, [*, B] or [*, B, 1], and the negatives of a sample are
    the samples of its own label: the estimate is of I(X; Y | C) (eq. 13), each label weighing as often as it occurs,
    and at most the mean log size of the groups. Exact: the groups of one size go through the critic in one call, so
    the cost is that of sum_c n_c^2 pairs instead of B^2. The host has to know those sizes: a GPU is waited for, and a
    CUDA graph cannot hold it. The critic sees x and y alone; append the label to x to give every label a critic of its
    own.
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
    """Upper bound: mean_i S[i, i] - mean_{i, j} S[i, j], with a critic fitted by InfoNCE (FactorCL, arXiv
    2306.05268, eq. 11 and Theorem 2). The second mean is over all pairs, the diagonal included, as in
    FactorCL's public code.

    It bounds I from above at the optimal critic; with the exact log density ratio its expectation is (B - 1)
    / B (I + KL(p(x) p(y) || p(x, y))). `anchor` chooses the direction of the InfoNCE that fits the critic.
    `condition` as in `InfoNCE` (within labels: eq. 14). The value needs no exponentials; an inner-product critic gives
    it in O(B D).
    """

    def forward(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] -> nats [*]. Raises ValueError for other shapes."""
        return self._mean(self._club, x, y, condition)

    def _club(self, statistics: StatisticsOf, x: Tensor, y: Tensor) -> Tensor:
        found = statistics(x, y, stats=("positive", "row_sum"))._asdict()
        gap: Tensor = found["positive"] - found["row_sum"] / x.shape[-2]
        return gap

    def learning_loss(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the critic minimises: the negative InfoNCE bound, [*]."""
        return -self._mean(self._info_nce, x, y, condition)
