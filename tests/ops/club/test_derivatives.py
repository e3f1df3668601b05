"""Derivatives of the CLUB bound: create_graph, torch.func, batched backward passes; and large means in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

X, Y = (torch.randn(3, 6, 4, dtype=torch.double) for _ in range(2))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest):
    reason = mk.backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    with mk.use_backend(request.param):
        yield request.param


def ours(x: Tensor, y: Tensor) -> Tensor:
    return gaussian_club(x, y, x.sin() + y)


def plain(x: Tensor, y: Tensor) -> Tensor:
    z = x.sin() + y
    apart = (z.unsqueeze(-3) - x.unsqueeze(-2)).square().mean(-2)
    return ((apart - (z - x).square()) * (-y).exp() / 2).sum(-1).mean(-1)


def test_create_graph_leaves_the_first_gradient_as_it_is(backend):
    """The first gradient is right if one input depends on another: a formula that differentiates through both would
    count a path twice."""
    z = X[0].clone().requires_grad_()
    modules = [mk.CLUB(4, 4, 5), mk.CLUBMean(4, 4), mk.LeaveOneOut(4, 4, 5), mk.VariationalUpperBound(4, 4, 5)]
    calls = [lambda m=m: m(z, z) for m in map(torch.nn.Module.double, [*modules, mk.BarberAgakov(4, 4, 5)])]
    for value in (*calls, lambda: ours(z, z), lambda: gaussian_club(z, None, 2 * z + 1)):
        once, twice = (torch.autograd.grad(value(), z, create_graph=again)[0] for again in (False, True))
        torch.testing.assert_close(twice, once)


def test_torch_func_and_forward_mode(backend):
    for way in (
        lambda f: grad(f, (0, 1))(X[0], Y[0]),
        lambda f: vmap(f, (0, None))(X, Y[0]),
        lambda f: vmap(grad(f))(X, Y),
        lambda f: jvp(f, (X[0], Y[0]), (Y[0], X[0])),
        lambda f: hessian(f)(X[0], Y[0]),
        lambda f: vmap(lambda x, y: jvp(f, (x, y), (y, x)))(X, Y),
    ):
        torch.testing.assert_close(way(ours), way(plain))


@pytest.mark.parametrize("again", [False, True])
def test_batches_of_slopes(backend, again):
    x, y, slopes = X.clone().requires_grad_(), Y.clone().requires_grad_(), torch.randn(4, 3, dtype=torch.double)
    got = torch.autograd.grad(ours(x, y), (x, y), slopes, is_grads_batched=True, create_graph=again)
    want = [torch.autograd.grad(plain(x, y), (x, y), g) for g in slopes]
    for g, w in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(w))


def test_per_sample_gradients_of_the_bounds():
    """vmap over groups of samples with shared module parameters."""
    y = torch.randint(3, (3, 6))
    for module in (mk.CLUB(4, 4, 5), mk.CLUBMean(4, 4), mk.BarberAgakov(4, 4, 5), mk.VariationalUpperBound(4, 4, 5)):
        module = module.double()
        want = [torch.autograd.grad(module(x, t), x)[0] for x, t in zip(X.clone().requires_grad_(), Y, strict=True)]
        torch.testing.assert_close(vmap(grad(module))(X, Y), torch.stack(want))
    module = mk.CLUBCategorical(4, 3).double()
    torch.testing.assert_close(vmap(module)(X, y), module(X, y))


@pytest.mark.parametrize("offset", [1e6, -3e8])
def test_fp64_keeps_the_remainder_of_a_large_mean(backend, offset):
    """A common offset does not change the bound; rounding the mean to fp64 at 1e6 would change it by 3e-10."""
    step = 2.0**-20  # offsets are exact on this grid
    mu, y = (((torch.randn(301, 7, dtype=torch.double) / step).round() * step).requires_grad_() for _ in range(2))
    logvar = torch.randn(301, 7, dtype=torch.double)
    near, far = gaussian_club(mu, logvar, y), gaussian_club(mu + offset, logvar, y + offset)
    assert abs(far - near) < 1e-13 * abs(near)
    for a, b in zip(torch.autograd.grad(far, (mu, y)), torch.autograd.grad(near, (mu, y)), strict=True):
        assert (a - b).norm() < 1e-13 * b.norm()
