"""The Wasserstein dependency measure, with two ways to keep its critic Lipschitz continuous."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..critics import Critic
from ..ops.common.checks import check_bool
from .base import CriticBound, GradientPenalty, check_paired, gradient_norm, interpolate
from .registry import declare


class SpectralNorm(nn.Module):
    """Divides a weight [*, out, in] by its largest singular value, which one step of power iteration per training call
    estimates (Miyato et al. 2018). Each matrix of a group is normalised separately."""

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
    """Normalises every matrix named `weight` of the critic in place. Raises ValueError if there is none."""
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
    """E_P[T] - E_Q[T] (Ozair et al. 2019). For the optimal critic T with Lipschitz constant 1 this is the Wasserstein-1
    distance between the joint distribution and the product of the marginals, in the Euclidean metric of [x, y]. Its
    unit is that of x and y, not nats.

    penalty: if positive, `learning_loss` adds penalty mean((|grad T| - 1)^2). The gradient with respect to (x, y) is
        taken at uniformly random points between a positive pair and a pair (x_i, y_j) of different samples (Gulrajani
        et al. 2017). The value can reach the distance, but exceeds it if gradient norms exceed 1.
    spectral_norm: normalise the critic's weight matrices in place. The value is then a lower bound, but a loose one.
    seed: of the private random generator.

    `gradient_norm_mean` and `gradient_norm_max` [*] hold the gradient norms of the last `learning_loss`; printing the
    module shows them. The measure grows with the scale of x and y, so limit the scale of representations that maximise
    it. Cost in addition to the critic's statistics: one evaluation of B pairs and its double backward.
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
        """The negative distance plus the gradient penalty, [*]. The penalty has gradients only in the critic."""
        return self.penalised(self.forward(x, y), self.gradient_norm(x, y))

    def gradient_norm(self, x: Tensor, y: Tensor) -> Tensor:
        """|grad T| at random points between pairs of P and pairs of Q, [*, B]; differentiable in the critic."""
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
