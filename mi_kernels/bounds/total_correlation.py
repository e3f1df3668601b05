"""Dependence of two or more modalities: the joint distribution compared with the product of all marginals (by
shuffling)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..critics import MLP
from ..critics.base import check_as_network
from .base import GradientPenalty, bounded_exp, gradient_norm, interpolate, log_mean_exp
from .registry import declare

MEASURES = ("kl", "f", "wasserstein")
SHUFFLES = ("independent", "together")


class JointCritic(nn.Module):
    """An MLP that scores rows, [*, B, dim] -> [*, B].

    dim: width of a row, the sum of the widths of all modalities.
    hidden_dims, activation: as in `ConcatCritic`.

    Raises ValueError for inputs of another width.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int] = (256, 256), activation: str = "leaky_relu"):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.mlp = MLP([dim, *hidden_dims, 1], activation)

    def forward(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.dim:
            raise ValueError(f"z must be [*, B, {self.dim}], got {tuple(z.shape)}")
        check_as_network("z", z, self.mlp.layers[0])
        scores: Tensor = self.mlp(z).squeeze(-1)
        return scores


@declare(
    "total_correlation",
    kind="lower",
    quantity="total correlation",
    value="as `dv`, `nwj` or `wasserstein`, for two or more modalities",
    negatives="shuffled modalities",
    critics=("joint",),
)
class TotalCorrelation(GradientPenalty):
    """Lower bound of the total correlation KL(P || Q), where P is the joint distribution of all modalities and Q the
    product of their marginals (MDM, Colombo et al. 2021).

    For two modalities this is the mutual information; for three it is I(a; v) + I(a, v; l). The critic T scores
    concatenated rows. With scores t_i of the rows of the batch and s_i of shuffled rows, whose modalities come from
    different samples:

        measure "kl"            mean t - log mean exp s     Donsker-Varadhan
        measure "f"             mean t - mean exp(s - 1)    NWJ
        measure "wasserstein"   mean t - mean s             W_1 if T has Lipschitz constant 1, see `penalty`

    "kl" and "f" are in nats, W_1 is in the units of the modalities. "kl" is not reliable above log B.

    critic: maps [*, B, D_1 + ... + D_M] to scores [*, B] or [*, B, 1]: a `JointCritic`, or a fusion network followed by
        a scorer. The measure is then at most that of the modalities themselves.
    shuffle: "independent" permutes every modality separately. No two permutations agree on any sample, so a shuffled
        row is a uniformly random tuple of distinct samples. "together" permutes all modalities alike, a control without
        dependence to find.
    penalty: weight of the gradient penalty of "wasserstein".
    seed: of the private generator that draws the permutations. Its state is in the checkpoint, so a penalty of weight 0
        does not change training in any bit. All group dimensions share the permutations.

    Cost: two evaluations of the critic on B rows, O(B) memory; the gradient penalty adds one evaluation with a double
        backward.
    """

    def __init__(
        self,
        critic: nn.Module,
        measure: str = "kl",
        *,
        penalty: float = 10.0,
        shuffle: str = "independent",
        seed: int = 0,
    ):
        super().__init__()
        if not callable(critic):
            raise TypeError(f"critic must map concatenated modalities to scores, got {type(critic).__name__}")
        for name, value, accepted in (("measure", measure, MEASURES), ("shuffle", shuffle, SHUFFLES)):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
        self.critic = critic
        self.measure, self.shuffle = measure, shuffle
        self.set_penalty(penalty, seed)

    def forward(self, *modalities: Tensor) -> Tensor:
        """Two or more modalities [*, B, D_m] with B at least the number of modalities -> [*]. Raises ValueError
        otherwise."""
        joint, product = self._rows(modalities)
        return self.estimate(self._scores(joint), self._scores(product))

    def learning_loss(self, *modalities: Tensor) -> Tensor:
        """The negative measure, [*]. For "wasserstein" it adds penalty mean((|grad T| - 1)^2) at random points between
        a row of P and a row of Q; the penalty has gradients only in the critic."""
        joint, product = self._rows(modalities)
        value = self.estimate(self._scores(joint), self._scores(product))
        if self.measure != "wasserstein":
            return -value
        return self.penalised(value, self._gradient_norm(joint, product))

    def estimate(self, joint: Tensor, product: Tensor) -> Tensor:
        """The measure, [*], from scores of samples of P [*, n] and of Q [*, m]."""
        if self.measure == "kl":
            return joint.mean(-1) - log_mean_exp(product, product.shape[-1])
        if self.measure == "f":
            return joint.mean(-1) - bounded_exp(log_mean_exp(product, product.shape[-1]) - 1)
        return joint.mean(-1) - product.mean(-1)

    def _rows(self, modalities: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The concatenated rows of the batch, and the shuffled rows."""
        if len(modalities) < 2:
            raise ValueError(f"modalities must be at least two tensors, got {len(modalities)}")
        lead = modalities[0].shape[:-1]
        for k, t in enumerate(modalities):
            if t.dim() < 2 or t.shape[:-1] != lead:
                raise ValueError(f"modalities[{k}] must be [*, B, D] with batch {tuple(lead)}, got {tuple(t.shape)}")
        if lead.numel() == 0 or lead[-1] < len(modalities):
            raise ValueError(
                f"modalities must hold at least as many samples as there are modalities ({len(modalities)}), "
                f"got {tuple(modalities[0].shape)}"
            )
        indices = self.draws.product_indices(lead[-1], len(modalities))
        if self.shuffle == "together":
            indices = [indices[-1]] * len(modalities)
        shuffled = [t[..., i.to(t.device), :] for t, i in zip(modalities, indices, strict=True)]
        return torch.cat(list(modalities), -1), torch.cat(shuffled, -1)

    def _scores(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.critic(rows)
        if scores.shape == (*rows.shape[:-1], 1):
            scores = scores.squeeze(-1)
        if scores.shape != rows.shape[:-1]:
            raise ValueError(f"critic must return scores {tuple(rows.shape[:-1])}, got {tuple(scores.shape)}")
        return scores if scores.dtype == torch.float64 else scores.float()

    def _gradient_norm(self, joint: Tensor, product: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        share = self.draws.uniform(joint.shape[:-1], joint)
        with torch.enable_grad():
            # Row i of Q contains sample i of the first modality. A permuted row of P makes the two end points
            # independent.
            other = self.draws.permutation(joint.shape[-2]).to(joint.device)
            points = interpolate(joint[..., other, :], product, share)
            return gradient_norm(self._scores(points), [points], differentiable)

    def extra_repr(self) -> str:
        text = f"measure={self.measure!r}, shuffle={self.shuffle!r}"
        return f"{text}, {self.penalty_repr()}" if self.measure == "wasserstein" else text
