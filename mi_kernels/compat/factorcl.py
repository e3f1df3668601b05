"""Replaces FactorCL's `critic_objectives.py` (commit 0f9f740): `from mi_kernels.compat.factorcl import InfoNCECritic`.

Critics score all pairs without storing B x B x 512 activations. Values, the order of the concatenated inputs ([x, y] in
InfoNCECritic, [y, x] in CLUBInfoNCECritic) and state-dict names are those of the original. Differences:
* `temperature=` divides the scores. The original accepts and ignores it; with its models' default of 1 nothing changes.
* SupConLoss is finite for anchors without positives and for features that are not normalised.
* probabilistic_classifier_eval clamps the logit instead of the rounded probability.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._mlp import check_pair, mlp, numpy_when_used, pair_scores, pair_statistics, star_modules
from .smile import infonce_lower_bound
from .supcontrast import SupConLoss

__all__ = [
    "CLUBInfoNCECritic",
    "ConcatCritic",
    "InfoNCECritic",
    "SeparableCritic",
    "SupConLoss",
    "infonce_lower_bound_obj",
    "mlp",
    "probabilistic_classifier_eval",
    "probabilistic_classifier_obj",
]
__all__ += star_modules("np", "nn", "torch")  # the original's scripts take them from here


def __getattr__(name: str) -> ModuleType:
    return numpy_when_used(__name__, name)


def _square(f: Tensor) -> int:
    if f.dim() != 2 or f.shape[0] != f.shape[1] or not f.shape[0]:
        raise ValueError(f"scores must have shape [B, B] with B >= 1, got {tuple(f.shape)}")
    return f.shape[0]


def probabilistic_classifier_obj(f: Tensor) -> Tensor:
    """Minus the mean binary cross-entropy of f [B, B] against the identity (Tsai et al. 2020, eq. 9)."""
    labels = torch.eye(_square(f), dtype=f.dtype, device=f.device)
    return -F.binary_cross_entropy_with_logits(f, labels)


def probabilistic_classifier_eval(f: Tensor) -> Tensor:
    """Mean over i of log((B - 1) p_ii / (1 - p_ii)) in nats, p_ii = sigmoid(f_ii) clamped to [1e-6, 1 - 1e-6]."""
    limit = math.log((1 - 1e-6) / 1e-6)
    size = _square(f)
    if size < 2:
        raise ValueError(f"scores must hold at least two samples, got {tuple(f.shape)}")
    return math.log(size - 1) + f.diagonal().clamp(-limit, limit).mean()


def infonce_lower_bound_obj(scores: Tensor) -> Tensor:
    """mean_i (log B + scores_ii - logsumexp_j scores_ij), [B, B] -> nats."""
    _square(scores)
    return infonce_lower_bound(scores)


class SeparableCritic(nn.Module):
    """scores[i, j] = <h(y_i), g(x_j)>; MLPs `_g` of x and `_h` of y."""

    def __init__(self, x1_dim: int, x2_dim: int, hidden_dim: int, embed_dim: int, layers: int, activation: str):
        super().__init__()
        self._g = mlp(x1_dim, hidden_dim, embed_dim, layers, activation)
        self._h = mlp(x2_dim, hidden_dim, embed_dim, layers, activation)

    def transformed_x(self, x: Tensor) -> Tensor:
        return self._g(x)

    def transformed_y(self, y: Tensor) -> Tensor:
        return self._h(y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._h(y) @ self._g(x).mT

    def pointwise_mi(self, x: Tensor, y: Tensor, estimator: str) -> Tensor:
        """Pointwise mutual information of each pair, [B], from a critic that was trained as a probabilistic
        classifier."""
        if estimator != "probabilistic_classifier":
            raise NotImplementedError(f"estimator must be 'probabilistic_classifier', got {estimator!r}")
        check_pair(x, y)
        if x.shape[0] < 2:
            raise ValueError(f"x must hold at least two samples, got {tuple(x.shape)}")
        return (self._h(y) * self._g(x)).sum(-1) + math.log(x.shape[0] - 1)


class ConcatCritic(nn.Module):
    """scores[i, j] = f([x_i, y_j]), materialised."""

    def __init__(self, A_dim: int, B_dim: int, hidden_dim: int, layers: int, activation: str, **extra_kwargs: Any):
        super().__init__()
        self._f = mlp(A_dim + B_dim, hidden_dim, 1, layers, activation)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        check_pair(x, y)
        return pair_scores(self._f, x, y)


class _ConcatBound(nn.Module):
    def __init__(self, A_dim: int, B_dim: int, hidden_dim: int, layers: int, activation: str, **extra_kwargs: Any):
        super().__init__()
        self._f = mlp(A_dim + B_dim, hidden_dim, 1, layers, activation)
        self.temperature = float(extra_kwargs.get("temperature", 1))
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


class InfoNCECritic(_ConcatBound):
    """forward(x [B, A_dim], y [B, B_dim]) returns the negative InfoNCE bound (arXiv 2306.05268, eq. 10), a loss.

    Every y_i is compared with all x_j. O(B) memory, cost as `mk.ConcatCritic`.
    """

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self._f, joint=True)
        found = pair_statistics(self._f, x_samples, y_samples, ("positive", "col_lse"), temperature=self.temperature)
        assert found.positive is not None and found.col_lse is not None
        return (found.col_lse - found.positive).mean() - math.log(x_samples.shape[0])


class CLUBInfoNCECritic(_ConcatBound):
    """forward -> the NCE-CLUB upper bound (eq. 11), to be minimised; learning_loss -> minus InfoNCE, for the critic.

    The network takes [y, x]. The second mean of the bound is over all pairs, the diagonal included.
    """

    def forward(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self._f, joint=True)
        found = pair_statistics(self._f, y_samples, x_samples, ("positive", "row_sum"), temperature=self.temperature)
        assert found.positive is not None and found.row_sum is not None
        return found.positive.mean() - found.row_sum.mean() / x_samples.shape[0]

    def learning_loss(self, x_samples: Tensor, y_samples: Tensor) -> Tensor:
        check_pair(x_samples, y_samples, self._f, joint=True)
        found = pair_statistics(self._f, y_samples, x_samples, ("positive", "row_lse"), temperature=self.temperature)
        assert found.positive is not None and found.row_lse is not None
        return (found.row_lse - found.positive).mean() - math.log(x_samples.shape[0])
