"""The MLP critic under torch.func, forward mode and batched or repeated backward passes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import mi_kernels as mk
from mi_kernels.backends import extension_status
from mi_kernels.ops.mlp_critic import api, reference
from mi_kernels.ops.mlp_critic.problem import Critic, Score
from tests.ops.transforms_cases import assert_batched_and_repeated_backward, assert_transforms

BACKENDS = ["reference", "chunked", *(["cpu"] if extension_status() == "available" else [])]
STATS = ("positive", "row_lse", "col_lse", "row_sum", "row_softplus")
F64 = torch.float64


def plain(x: Tensor, y: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    n = len(parameters) // 2
    weights, biases = parameters[:n], parameters[n:]
    u, v = x @ weights[0][..., : x.shape[-1]].mT, y @ weights[0][..., x.shape[-1] :].mT + biases[0].unsqueeze(-2)
    rest = [w if w.dim() == 3 else w.unsqueeze(0) for w in weights[1:]]
    offsets = [b if b.dim() == 2 else b.unsqueeze(0) for b in biases[1:]]
    u, v = (t.flatten(0, -3) if t.dim() > 2 else t.unsqueeze(0) for t in (u, v))
    found = reference.statistics(Critic(u, v, rest, offsets), Score("tanh", "identity", False))
    return tuple(t.reshape(*x.shape[:-2], t.shape[-1]) for t in found)


def operator(backend: str, budget: int = 2**26) -> Callable[..., tuple[Tensor, ...]]:
    def call(x: Tensor, y: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        n = len(parameters) // 2
        options = {"activation": "tanh", "stats": STATS, "memory_budget": budget, "backend": backend}
        return api.statistics(x, y, parameters[:n], parameters[n:], **options)[:5]  # type: ignore[arg-type, return-value]

    return call


def inputs(hidden: tuple[int, ...], groups: tuple[int, ...] = (), batch: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    widths = [5, *hidden, 1]
    weights = [torch.randn(*groups, o, i, dtype=F64) / 2 for i, o in pairwise(widths)]
    biases = [torch.randn(*groups, o, dtype=F64) / 3 for o in widths[1:]]
    lead = groups or batch
    return torch.randn(*lead, 4, 3, dtype=F64), torch.randn(*lead, 4, 2, dtype=F64), *weights, *biases


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend: str) -> None:
    assert_transforms(operator(backend), plain, inputs((3, 2)))


@pytest.mark.parametrize("backend", BACKENDS[-1:])
@pytest.mark.parametrize(("hidden", "groups", "batch"), [((3,), (2,), ()), ((2, 3), (), (2,))])
def test_transforms_of_groups_and_batches(
    hidden: tuple[int, ...], groups: tuple[int, ...], batch: tuple[int, ...], backend: str
) -> None:
    assert_transforms(operator(backend), plain, inputs(hidden, groups, batch))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 2**26])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_gradients_of_dependent_inputs_do_not_depend_on_how_they_are_asked_for(
    activation: str, budget: int, backend: str
) -> None:
    _, _, *parameters = inputs((6, 5))

    def call(x: Tensor) -> Tensor:
        y = x[:, :2].sin() + x[:, 1:].cos()
        options = {"activation": activation, "stats": STATS, "memory_budget": budget, "backend": backend}
        return torch.stack(api.statistics(x, y, parameters[:3], parameters[3:], **options)[:5])  # type: ignore[arg-type]

    assert_batched_and_repeated_backward(call, torch.randn(4, 3, dtype=F64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [mk.InfoNCE, mk.SMILE, mk.NCECLUB])
def test_per_sample_gradients_of_a_bound(bound: type, backend: str) -> None:
    model = bound(mk.ConcatCritic(3, 2, (8, 6), backend=backend)).double()
    parameters = dict(model.named_parameters())
    x, y = torch.randn(3, 4, 3, dtype=F64), torch.randn(3, 4, 2, dtype=F64)
    loss = lambda p, a, b: functional_call(model, p, (a, b))  # noqa: E731
    found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(3):
        each = torch.autograd.grad(model(x[i], y[i]), list(parameters.values()))
        for name, want in zip(parameters, each, strict=True):
            torch.testing.assert_close(found[name][i], want)
    value, tangent = jvp(lambda a: model(a, y[0]), (x[0],), (x[1],))
    leaf = x[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf, y[0]), leaf)
    torch.testing.assert_close(value, model(x[0], y[0]))
    torch.testing.assert_close(tangent, (slope * x[1]).sum())


def test_the_clipped_statistic_has_no_gradient_under_transforms() -> None:
    x, y, *parameters = inputs((3, 2))
    clipped = lambda a: api.statistics(  # noqa: E731
        a, y, parameters[:3], parameters[3:], stats=("clipped_row_lse",), clip=0.1
    ).clipped_row_lse
    torch.testing.assert_close(vmap(clipped)(x[None])[0], clipped(x))
    assert not grad(lambda a: clipped(a).sum())(x).any()
    assert not jvp(clipped, (x,), (x,))[1].any()
