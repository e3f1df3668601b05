"""Shared by the bounds: argument checks, log-mean-exponentials, private random generators and gradient penalties."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..critics import Critic
from ..ops.common.checks import check_choice, check_integer, check_number, check_samples

ANCHORS = ("x", "y")


def check_paired(x: Tensor, y: Tensor, least: int = 1) -> None:
    """Raises ValueError unless x is [*, B, Dx] and y is [*, B, Dy] with B >= least. The critic checks Dx and Dy."""
    check_samples("x", x)
    check_samples("y", y)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"y must have the batch dimensions of x, {tuple(x.shape[:-1])}, got {tuple(y.shape[:-1])}")
    if x.shape[-2] < least:
        raise ValueError(
            f"x must hold at least {least} samples, because the other samples are the negatives, got {tuple(x.shape)}"
        )


def check_anchor(anchor: str) -> None:
    check_choice("anchor", anchor, ANCHORS)


def log_mean_exp(log_sums: Tensor, pairs: int) -> Tensor:
    """log of the mean of exp S over `pairs` pairs, [*], from the log-sum-exps of rows or columns [*, B]."""
    return log_sums.logsumexp(-1) - math.log(pairs)


def bounded_exp(t: Tensor) -> Tensor:
    """exp t, continued by its tangent above 80 (700 in fp64), so that value and gradient do not overflow."""
    limit = 700.0 if t.dtype == torch.float64 else 80.0
    return t.clamp(max=limit).exp() * (1 + (t - limit).clamp(min=0))


def with_gradient_of(value: Tensor, objective: Tensor) -> Tensor:
    """Returns `value` with the gradient of `objective`."""
    return value.detach() + (objective - objective.detach())


class CriticBound(nn.Module):
    """Base class of bounds that are computed from the statistics of one critic.

    critic: an object with the method `statistics` of `Critic`. Raises TypeError otherwise.
    """

    def __init__(self, critic: Critic):
        super().__init__()
        if isinstance(critic, type) or not callable(getattr(critic, "statistics", None)):
            raise TypeError(f"critic must have a method statistics(x, y, stats, pairs), got {type(critic).__name__}")
        self.critic = critic

    def off_diagonal(self, x: Tensor, y: Tensor, *stats: str, clip: float | None = None) -> list[Tensor]:
        """Returns the named statistics over pairs i != j. Raises ValueError for fewer than two samples."""
        check_paired(x, y, least=2)
        options = {} if clip is None else {"clip": clip}
        found = self.critic.statistics(x, y, stats=stats, pairs="off_diagonal", **options)._asdict()
        return [found[name] for name in stats]


class Draws(nn.Module):
    """A private random generator whose state is part of the checkpoint.

    It leaves torch's global generators unchanged, so a penalty of weight 0 does not change training in any bit.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def uniform(self, shape: torch.Size, like: Tensor) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(like.device, like.dtype)

    def product_indices(self, batch: int, modalities: int) -> list[Tensor]:
        """One permutation [batch] per modality. Together, row i of all permutations is a uniformly random tuple of
        distinct samples; no two permutations agree at any position."""
        order = self.permutation(batch)
        shifts = [0, *(self.permutation(batch - 1)[: modalities - 1] + 1).tolist()]
        indices = []
        for shift in shifts:
            index = torch.empty_like(order)
            index[order] = order.roll(-shift)
            indices.append(index)
        return indices

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["generator"])
        super().__setstate__({**state, "generator": generator})


class GradientPenalty(nn.Module):
    """Base class of bounds with a penalty that keeps the norm of the critic's gradient near 1 (Gulrajani et al. 2017).

    Holds the weight of the penalty, a private random generator and the gradient norms of the last step.
    """

    penalty: float
    gradient_norm_mean: Tensor
    gradient_norm_max: Tensor

    def set_penalty(self, penalty: float, seed: int) -> None:
        check_number("penalty", penalty)
        check_integer("seed", seed)
        if penalty < 0:
            raise ValueError(f"penalty must not be negative, got {penalty}")
        self.penalty = penalty
        self.draws = Draws(seed)
        for name in ("gradient_norm_mean", "gradient_norm_max"):
            self.register_buffer(name, torch.tensor(math.nan), persistent=False)

    def penalised(self, value: Tensor, norm: Tensor) -> Tensor:
        """penalty mean((norm - 1)^2) - value, [*], from norms [*, B]. With penalty 0 the norms are only recorded."""
        self.gradient_norm_mean, self.gradient_norm_max = norm.detach().mean(-1), norm.detach().amax(-1)
        return self.penalty * (norm - 1).square().mean(-1) - value if self.penalty else -value

    def penalty_repr(self) -> str:
        mean, top = self.gradient_norm_mean.mean(), self.gradient_norm_max.max()
        if mean.is_meta:
            return f"penalty={self.penalty}"
        return f"penalty={self.penalty}, gradient norm of the last step: mean {mean.item():.3f}, max {top.item():.3f}"


def gradient_norm(scores: Tensor, points: list[Tensor], differentiable: bool) -> Tensor:
    """Norm of the gradient of score i with respect to point i (all inputs concatenated): [*, B] from scores [*, B]."""
    gradients = torch.autograd.grad(scores.sum(), points, create_graph=differentiable)
    return torch.linalg.vector_norm(torch.cat(gradients, -1), dim=-1)


def interpolate(joint: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Points between the detached rows of both arguments, at position share [*, B]; leaves that require gradients."""
    between = torch.lerp(other.detach(), joint.detach(), share.unsqueeze(-1))
    return between.requires_grad_()
