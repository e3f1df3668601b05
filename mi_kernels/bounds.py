"""Bounds on the mutual information between two batches, in nats: a few lines over a critic's statistics.

`bound(x, y)` is the estimate, [*]; `bound.learning_loss(x, y)` is what the critic minimises. Both are
differentiable in x, y and the critic. Scores are never materialised; cost is that of the critic's
`statistics`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .critics import Critic

ANCHORS = ("x", "y")


def _with_condition(x: Tensor, y: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    if condition is None:
        return x, y
    for name, t in (("x", x), ("y", y)):
        if t.dim() < 2 or condition.shape[:-1] != t.shape[:-1]:
            raise ValueError(
                f"condition must be [*, B, C] with the batch dimensions of {name}, {tuple(t.shape[:-1])}, "
                f"got {tuple(condition.shape)}"
            )
    return torch.cat([x, condition.to(x.dtype)], -1), torch.cat([y, condition.to(y.dtype)], -1)


class _CriticBound(nn.Module):
    def __init__(self, critic: Critic, anchor: str = "x"):
        super().__init__()
        if anchor not in ANCHORS:
            raise ValueError(f"anchor must be one of {ANCHORS}, got {anchor!r}")
        self.critic = critic
        self.anchor = anchor

    def _inputs(self, x: Tensor, y: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both sides with the condition, checked; the critic checks its own widths, condition included."""
        for name, t in (("x", x), ("y", y)):
            if t.dim() < 2 or t.shape[:-1].numel() == 0:
                raise ValueError(
                    f"{name} must be [*, B, features] with at least one sample, got {tuple(t.shape)}"
                )
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"y must have the batch dimensions of x, {tuple(x.shape[:-1])}, got {tuple(y.shape[:-1])}"
            )
        return _with_condition(x, y, condition)

    def _info_nce(self, x: Tensor, y: Tensor) -> Tensor:
        log_sum = "row_lse" if self.anchor == "x" else "col_lse"
        found = self.critic.statistics(x, y, stats=("positive", log_sum))._asdict()
        gap: Tensor = found["positive"] - found[log_sum]
        return gap.mean(-1) + math.log(x.shape[-2])

    def extra_repr(self) -> str:
        return f"anchor={self.anchor!r}"


class InfoNCE(_CriticBound):
    """Lower bound: mean_i S[i, i] - mean_i log sum_j exp S[i, j] + log B  (van den Oord et al. 2018;
    FactorCL, arXiv 2306.05268, eq. 10). At most log B.

    `anchor="x"` contrasts every x_i with all y_j, as the papers write it; `anchor="y"` contrasts every y_j
    with all x_i, which is what FactorCL's public code computes.

    `condition` [*, B, C] is concatenated to both sides, so the critic must take x_dim + C and y_dim + C. The
    negatives stay unconditional, as in FactorCL's code: the estimate is of I((X, C); (Y, C)) = H(C) + I(X; Y
    | C) for a discrete C, not of I(X; Y | C) itself.
    """

    def forward(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] -> nats [*]. Raises ValueError for other shapes."""
        x, y = self._inputs(x, y, condition)
        return self._info_nce(x, y)

    def learning_loss(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """The negative bound, [*]."""
        return -self.forward(x, y, condition)


class NCECLUB(_CriticBound):
    """Upper bound: mean_i S[i, i] - mean_{i, j} S[i, j], with a critic fitted by InfoNCE (FactorCL, arXiv
    2306.05268, eq. 11 and Theorem 2). The second mean is over all pairs, the diagonal included, as in
    FactorCL's public code.

    It bounds I from above at the optimal critic; with the exact log density ratio its expectation is (B - 1)
    / B (I + KL(p(x) p(y) || p(x, y))). `anchor` chooses the direction of the InfoNCE that fits the critic.
    `condition` as in `InfoNCE`. The value needs no exponentials; an inner-product critic gives it in O(B D).
    """

    def forward(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] -> nats [*]. Raises ValueError for other shapes."""
        x, y = self._inputs(x, y, condition)
        found = self.critic.statistics(x, y, stats=("positive", "row_sum"))._asdict()
        value: Tensor = found["positive"].mean(-1) - found["row_sum"].mean(-1) / x.shape[-2]
        return value

    def learning_loss(self, x: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the critic minimises: the negative InfoNCE bound, [*]."""
        x, y = self._inputs(x, y, condition)
        return -self._info_nce(x, y)
