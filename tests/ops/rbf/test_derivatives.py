"""Derivatives of the Gaussian kernel sums: create_graph, torch.func, batched backward passes and compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, vmap

import mi_kernels as mk

BACKENDS = ["reference", "chunked", "cpu"]
X, Y = (torch.randn(3, 6, 4, dtype=torch.double) for _ in range(2))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    reason = mk.backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    with mk.use_backend(request.param):
        yield request.param


def kernel(a: Tensor, b: Tensor, s: float | Tensor) -> Tensor:
    return (-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / (2 * s * s)).exp()


def plain_mmd(x: Tensor, y: Tensor, s: float | Tensor = 1.3) -> Tensor:
    xx, yy, xy = (kernel(*pair, s).mean((-2, -1)) for pair in ((x, x), (y, y), (x, y)))
    return xx + yy - 2 * xy


def plain_hsic(x: Tensor, y: Tensor, s: float | Tensor = 1.3) -> Tensor:
    h = torch.eye(x.shape[-2], dtype=x.dtype) - 1 / x.shape[-2]
    k, m = h @ kernel(x, x, s) @ h, h @ kernel(y, y, s) @ h
    of = lambda a, b: (a * b).sum((-2, -1))  # noqa: E731
    return of(k, m) / (of(k, k) * of(m, m)).sqrt()


PAIRS = {
    "mmd": (lambda x, y, s=1.3: mk.mmd(x, y, bandwidth=s), plain_mmd),
    "hsic": (lambda x, y, s=1.3: mk.hsic(x, y, bandwidth=s), plain_hsic),
}


@pytest.mark.parametrize("bandwidth", [None, 1.3])
def test_create_graph_leaves_the_first_gradient_as_it_is(backend, bandwidth):
    """The first gradient is right if one input depends on another: a formula that differentiates through both would
    count a path twice."""
    z = X[0].clone().requires_grad_()
    for value in (
        lambda: mk.mmd(z, z.sin(), bandwidth=bandwidth),
        lambda: mk.mmd(z, 2 * z + 1, bandwidth=z.std() if bandwidth else None),
        lambda: mk.hsic(z, z.sin(), bandwidth=bandwidth),
        lambda: mk.hsic(z, z, bandwidth=(z.std(), z.square().mean()) if bandwidth else None, normalized=False),
        lambda: mk.gaussian_mmd(z, prior_samples=z.cos(), bandwidth=bandwidth),
        lambda: mk.gaussian_mmd(z, bandwidth=z.std() if bandwidth else None),
    ):
        once, twice = (torch.autograd.grad(value(), z, create_graph=again)[0] for again in (False, True))
        torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("name", PAIRS)
def test_torch_func_and_forward_mode(backend, name):
    ours, plain = PAIRS[name]
    for way in (
        lambda f: grad(f, (0, 1))(X[0], Y[0]),
        lambda f: vmap(f, (0, None))(X, Y[0]),
        lambda f: vmap(grad(f))(X, Y),
        lambda f: grad(lambda x, y: vmap(f)(x, y).sum())(X, Y),
        lambda f: jvp(f, (X[0], Y[0]), (Y[0], X[0])),
        lambda f: hessian(f)(X[0], Y[0]),
        lambda f: vmap(lambda x, y: jvp(f, (x, y), (y, x)))(X, Y),
        lambda f: vmap(lambda s: f(X[0], Y[0], s))(torch.tensor([1.0, 2.0]).double()),
        lambda f: jacfwd(lambda s: f(X[0], Y[0], s))(torch.tensor(1.2).double()),
    ):
        torch.testing.assert_close(way(ours), way(plain))


def test_the_median_bandwidth_under_transforms_is_a_constant(backend):
    each = [mk.mmd(x, y).item() for x, y in zip(X, Y, strict=True)]
    torch.testing.assert_close(vmap(mk.mmd)(X, Y), torch.tensor(each).double())
    s = mk.losses.divergences.median_distance(X[:1], Y[:1]).item()
    for way in (lambda f: grad(f)(X[0], Y[0]), lambda f: jvp(f, (X[0], Y[0]), (Y[0], X[0]))):
        torch.testing.assert_close(way(mk.mmd), way(lambda x, y: plain_mmd(x, y, s)))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("again", [False, True])
def test_batches_of_slopes(backend, name, again):
    ours, _ = PAIRS[name]
    x, y, slopes = X.clone().requires_grad_(), Y.clone().requires_grad_(), torch.randn(4, 3, dtype=torch.double)
    got = torch.autograd.grad(ours(x, y), (x, y), slopes, is_grads_batched=True, create_graph=again)
    want = [torch.autograd.grad(ours(x, y), (x, y), g) for g in slopes]
    for g, w in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(w))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_graphs_take_other_bandwidths_and_shapes(dynamic):
    def run(x: Tensor, y: Tensor, s: float) -> Tensor:
        found = mk.mmd(x, y, bandwidth=[s, 2 * s], estimator="unbiased") + mk.hsic(x, y, bandwidth=(s, None))
        return found + mk.gaussian_mmd(x, bandwidth=s) + mk.mmd(x, y)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for s, batch in ((1.5, 9), (2.5, 11)):
        x, y = torch.randn(batch, 4, requires_grad=True), torch.randn(batch, 4)
        got, want = compiled(x, y, s), run(x, y, s)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("name", PAIRS)
def test_a_loss_scale_reaches_fp16_gradients_before_they_are_rounded(backend, name):
    """A weight of 1e-6 is compensated by a loss scale of 2^20. Both must be multiplied in before gradients are rounded
    to fp16; otherwise they are noise."""
    x, y = (t.half().requires_grad_() for t in (X, Y))
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    ours, plain = PAIRS[name]
    got = torch.autograd.grad((ours(x, y) * 1e-6 * 2.0**20).sum(), (x, y))
    want = torch.autograd.grad((plain(*wide) * 1e-6 * 2.0**20).sum(), wide)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float16
        assert (g.double() - w).norm() < 2**-10 * w.norm()
