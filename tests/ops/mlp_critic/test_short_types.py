"""Errors (against fp64) of 16-bit InfoNCE gradients, compared with the public code that runs a network on every
pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mi_kernels.backends import extension_status
from mi_kernels.ops.mlp_critic import api

BACKENDS = ["chunked", *(["cpu"] if extension_status() == "available" else [])]
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(32, 16, 64, 2), (25, 16, 48, 2), (24, 8, 64, 1), (33, 16, 32, 2)]  # B, D, H, hidden layers
Loss = Callable[[nn.Sequential, Tensor, Tensor], Tensor]


def network(features: int, hidden: int, layers: int) -> nn.Sequential:
    widths = [2 * features, *[hidden] * layers]
    modules: list[nn.Module] = []
    for i, o in pairwise(widths):
        modules += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(hidden, 1))


def public(critic: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Minus InfoNCE as usually written: all pairs concatenated, positives computed separately, each with a mean."""
    n = len(y)
    pairs = torch.cat([x.unsqueeze(0).expand(n, *x.shape), y.unsqueeze(1).expand(n, n, -1)], -1)
    return critic(pairs).squeeze(-1).logsumexp(1).mean() - critic(torch.cat([x, y], -1)).mean() - math.log(n)


def ours(backend: str, budget: int) -> Loss:
    def loss(critic: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        linear = [m for m in critic if isinstance(m, nn.Linear)]
        found = api.statistics(
            x, y, [m.weight for m in linear], [m.bias for m in linear], stats=("positive", "col_lse"),
            memory_budget=budget, backend=backend,
        )  # fmt: skip
        assert found.positive is not None and found.col_lse is not None
        return (found.col_lse - found.positive).mean() - math.log(len(x))

    return loss


def gradient(loss: Loss, critic: nn.Sequential, x: Tensor, y: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """The gradients of x, y and all parameters but the last bias, as one vector. The last bias shifts all scores, so
    its gradient is 0."""
    leaves = [x.detach().requires_grad_(), y.detach().requires_grad_(), *list(critic.parameters())[:-1]]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(critic, *leaves[:2])
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(value, leaves)])


def errors(losses: list[Loss], dtype: torch.dtype, autocast: bool, shapes: list[Shape] = SHAPES) -> list[float]:
    """The relative error of each loss's gradient, as a geometric mean over the shapes."""
    logs = torch.zeros(len(losses))
    for seed, (b, d, h, layers) in enumerate(shapes):
        torch.manual_seed(seed)
        critic = network(d, h, layers)
        x = torch.randn(b, d)
        y = 0.8 * x + 0.6 * torch.randn(b, d)
        if not autocast:
            critic, x, y = critic.to(dtype), x.to(dtype), y.to(dtype)
        exact_critic = network(d, h, layers).double()
        exact_critic.load_state_dict(critic.state_dict())
        exact = gradient(public, exact_critic, x.double(), y.double())
        found = [gradient(loss, critic, x, y, dtype if autocast else None) for loss in losses]
        logs += torch.tensor([math.log((g - exact).norm() / exact.norm()) for g in found])
    return (logs / len(shapes)).exp().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_err_no_more_than_those_of_the_public_formulation(
    dtype: torch.dtype, autocast: bool, backend: str
) -> None:
    kept, recomputed, theirs = errors([ours(backend, 2**26), ours(backend, 1), public], dtype, autocast)
    assert kept <= theirs and recomputed <= theirs, (kept, recomputed, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_of_both_halves_is_rounded_once(dtype: torch.dtype) -> None:
    x, y = torch.randn(40, 6).to(dtype), torch.randn(40, 7).to(dtype)
    weight, bias = torch.randn(9, 13).to(dtype), torch.randn(9).to(dtype)
    last, zero = torch.eye(9)[:1].to(dtype), torch.zeros(1, dtype=dtype)
    found = api.scores(x, y, [weight, last], [bias, zero], activation="leaky_relu")
    exact = (x.double() @ weight[0, :6].double())[:, None] + y.double() @ weight[0, 6:].double() + bias[0].double()
    rounded = torch.nn.functional.leaky_relu(exact.to(dtype))
    assert (found == rounded).double().mean() > 0.99  # except fp32 sums halfway between two 16-bit numbers
