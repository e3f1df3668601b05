"""The Wasserstein dependency measure, and what keeps its critic Lipschitz."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..critics import Critic
from ..ops.common.checks import check_bool
from .base import CriticBound, GradientPenalty, check_paired, gradient_norm, interpolate
from .registry import declare


class SpectralNorm(nn.Module):
    """A weight [*, out, in] over its largest singular value, found by one step of power iteration a use in training
    (Miyato et al. 2018); matrices of a group are normalised each by their own."""

    v: Tensor

    def __init__(self, weight: Tensor, warm_up: int = 15):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        v = torch.randn(*weight.shape[:-2], weight.shape[-1], 1, generator=draw).to(weight)
        self.register_buffer("v", nn.functional.normalize(v, dim=-2))
        with torch.no_grad():
            for _ in range(warm_up):
                self._step(weight)

    def _step(self, weight: Tensor) -> None:
        u = nn.functional.normalize(weight @ self.v, dim=-2)
        self.v = nn.functional.normalize(weight.mT @ u, dim=-2)

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self._step(weight)
        u = nn.functional.normalize((weight @ self.v).detach(), dim=-2)
        return weight / (u.mT @ weight @ self.v)


def apply_spectral_norm(critic: nn.Module) -> None:
    """Normalises every matrix named `weight` of the critic, in place. Raises ValueError where there is none."""
    found = [(m, m._parameters.get("weight")) for m in critic.modules()]
    matrices = [(module, weight.detach()) for module, weight in found if weight is not None and weight.dim() > 1]
    if not matrices:
        raise ValueError(f"critic must have layers with a weight that spectral_norm can normalise, got {critic}")
    for module, weight in matrices:
        parametrize.register_parametrization(module, "weight", SpectralNorm(weight))


@declare(
    "wasserstein",
    kind="lower",
    quantity="the Wasserstein distance W_1",
    value="E_P[T] - E_Q[T], T kept Lipschitz",
    negatives="off the diagonal",
)
class WassersteinDependency(CriticBound, GradientPenalty):
    """E_P[T] - E_Q[T]: at the best critic of Lipschitz constant 1 the Wasserstein-1 distance, in the Euclidean metric
    of [x, y], between the joint and the product of the marginals (Ozair et al. 2019), in the units of x and y and not
    nats.

    Two ways to keep the critic Lipschitz. `penalty` > 0 adds penalty mean((|grad T| - 1)^2) to `learning_loss`, the
    gradient in (x, y) taken at a uniformly random point between a true pair and a pair (x_i, y_j) of different samples
    (Gulrajani et al. 2017); it reaches the distance, but a gradient longer than 1 overstates it. `spectral_norm`
    normalises the critic's weight matrices, in place; the value is then a lower bound, and a loose one. The gradient
    norms met in the last `learning_loss` are `gradient_norm_mean` and `gradient_norm_max` [*], and are printed.

    The measure grows with the scale of x and y: bound representations that are trained on it. Cost beyond the
    critic's sums: one evaluation of B pairs and its double backward. Draws come from a generator of its own.
    """

    def __init__(self, critic: Critic, penalty: float = 10.0, *, spectral_norm: bool = False, seed: int = 0):
        super().__init__(critic)
        check_bool(spectral_norm=spectral_norm)
        self.set_penalty(penalty, seed)
        self.spectral_norm = spectral_norm
        if spectral_norm:
            apply_spectral_norm(critic)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [*, B, Dx], y [*, B, Dy] with B >= 2 -> [*]. Raises ValueError for other shapes."""
        positive, row_sum = self.off_diagonal(x, y, "positive", "row_sum")
        return positive.mean(-1) - row_sum.mean(-1) / (x.shape[-2] - 1)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative distance plus the gradient penalty, which reaches the critic alone: [*]."""
        return self.penalised(self.forward(x, y), self.gradient_norm(x, y))

    def gradient_norm(self, x: Tensor, y: Tensor) -> Tensor:
        """|grad T| at random points between pairs of P and of Q, [*, B]; differentiable in the critic."""
        check_paired(x, y, least=2)
        batch = x.shape[-2]
        first = self.draws.permutation(batch)
        i, j = (k[first].to(x.device) for k in self.draws.product_indices(batch, 2))
        share = self.draws.uniform(x.shape[:-1], x)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x, y = interpolate(x, x[..., i, :], share), interpolate(y, y[..., j, :], share)
            scores = self.critic.statistics(x, y, stats=("positive",)).positive
            assert scores is not None
            return gradient_norm(scores, [x, y], differentiable)

    def extra_repr(self) -> str:
        return f"spectral_norm={self.spectral_norm}, {self.penalty_repr()}"
