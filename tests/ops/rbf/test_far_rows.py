"""Gaussian kernel sums of samples that spread over many bandwidths, against a formula over all differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.rbf import dispatch, distances

BACKENDS = ["reference", "chunked", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = mk.backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def kernel(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return (-(a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / (2 * s.square())).exp()


def direct_mmd(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return kernel(x, x, s).mean() + kernel(y, y, s).mean() - 2 * kernel(x, y, s).mean()


def direct_hsic(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    h = torch.eye(x.shape[-2], dtype=x.dtype) - 1 / x.shape[-2]
    return (h @ kernel(x, x, s) @ h * kernel(y, y, s)).mean()


def outlier(t: Tensor, far: float) -> Tensor:
    t[3] = far
    return t


def clusters(t: Tensor, far: float) -> Tensor:
    """Two clusters whose rows alternate."""
    t[::2] += far
    return t


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "outlier": lambda t: outlier(t, 1e6),
    "outlier beyond the range of squares": lambda t: outlier(t, 1e25),
    "clusters": lambda t: clusters(t, 1e4),
    "clusters apart": lambda t: clusters(t, 1e8).sort(0).values,
    "every row on a scale of its own": lambda t: t * 10 ** torch.linspace(-3, 6, len(t))[:, None],
    "duplicates": lambda t: clusters(torch.cat([t[:20]] * 5)[: len(t)], 1e5),
}


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("depth", [3, 70])
def test_far_rows_cost_no_accuracy(backend, monkeypatch, spread, depth):
    """Values and all gradients, with and without create_graph, in fp32 against fp64."""
    monkeypatch.setattr(dispatch, "CHUNK_BYTES", 8 * 100 * 32)
    x, y = (SPREADS[spread](torch.randn(n, depth)) for n in (75, 90))
    for ours, formula, pair in ((mk.mmd, direct_mmd, (x, y)), (mk.hsic, direct_hsic, (x, y[:75].sin() + x / 1e4))):
        leaves = [*pair, torch.tensor(1.5 * depth**0.5)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        options = {"normalized": False} if ours is mk.hsic else {}
        got, want = ours(*leaves[:2], bandwidth=leaves[2], backend=backend, **options), formula(*exact)
        assert error(got.detach(), want.detach()) < 3e-6
        wanted = torch.autograd.grad(want, exact)
        for again in (False, True):
            value = ours(*leaves[:2], bandwidth=leaves[2], backend=backend, **options)
            for g, w in zip(torch.autograd.grad(value, leaves, create_graph=again), wanted, strict=True):
                assert error(g.detach(), w) < 3e-5


@pytest.mark.parametrize("unit", [1e-20, 1e25])
def test_units_do_not_matter(backend, unit):
    x, y = torch.randn(70, 6), torch.randn(66, 6) + 0.3
    for run in (lambda u: mk.mmd(u * x, u * y, bandwidth=u * 2.0, backend=backend),
                lambda u: mk.mmd(u * x, u * y, backend=backend),
                lambda u: mk.hsic(u * x[:66], y, bandwidth=(u * 2.0, 1.0), backend=backend),
                lambda u: mk.hsic(u * x[:66], y, backend=backend)):  # fmt: skip
        torch.testing.assert_close(run(unit), run(1.0), rtol=2e-6, atol=0)


def test_gradients_carry_the_unit(backend):
    x, y = torch.randn(70, 6), torch.randn(66, 6) + 0.3
    for unit in (1e-12, 1e12):
        found = []
        for u in (1.0, unit):
            leaves = [(u * t).requires_grad_() for t in (x, y, torch.tensor(2.0))]
            value = mk.mmd(leaves[0], leaves[1], bandwidth=leaves[2], backend=backend)
            found.append([u * g for g in torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_common_samples_take_the_fast_path():
    """Gaussian samples with the median bandwidth, or a bandwidth of 1, use the fast inner products for all
    distances."""
    for depth in (16, 64, 512):
        x = torch.randn(2, 300, depth)
        for bandwidth in (1.0, depth**0.5):
            (points,) = distances.points(torch.tensor([1 / bandwidth, 1 / bandwidth]), x)
            assert not distances.squared(points, points, 0)[1]


def test_the_median_bandwidth_of_spread_and_of_equal_rows():
    median = mk.losses.divergences.median_distance
    near, depth = torch.randn(1, 100, 4000), 4000
    want = torch.pdist(near[0].double()).median()
    for far in (1e6, 1e20):
        spread = near.clone()
        spread[:, 0] = far
        assert abs(median(spread) / want - 1) < 1e-3
    two = torch.cat([near[:, :30], near[:, 30:] + 1e7], 1)  # most pairs lie within the larger cluster
    assert abs(median(two) / torch.pdist(two[0].double()).median() - 1) < 1e-6
    for value in (0.1, 3.7, 1e10):
        assert median(torch.full((1, 50, depth), value) * torch.rand(depth)) == 1
    assert median(torch.full((1, 5, 3), torch.nan)).isnan()


def test_infinite_and_missing_samples_show(backend):
    for bad in (torch.inf, torch.nan):
        x, y = torch.randn(70, 3), torch.randn(70, 3)
        x[5, 1] = bad
        assert mk.mmd(x, y, bandwidth=1.0, backend=backend).isnan()
        assert mk.hsic(y, x, bandwidth=1.0, backend=backend).isnan()


def test_distances_can_be_differentiated_twice_and_under_transforms():
    a, b = torch.randn(2, 4, 3, dtype=torch.double), torch.randn(2, 5, 3, dtype=torch.double)
    leaves = [t.requires_grad_() for t in (a, b)]
    assert torch.autograd.gradcheck(distances.apart, leaves, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(distances.apart, leaves)
    plain = lambda a, b: (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)  # noqa: E731
    for way in (torch.func.hessian, torch.func.jacfwd, lambda f: torch.func.vmap(torch.func.jacrev(f))):
        got, want = (way(lambda a, b, f=f: f(a, b).sin())(a.detach(), b.detach()) for f in (distances.apart, plain))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", ["mmd", "hsic"])
def test_kernels_far_below_one_keep_their_digits(backend: str, loss: str) -> None:
    """All pairs are about six bandwidths apart: in fp32, 1 - k would lose k's digits, and so would the gradients."""
    x, y = (torch.randn(9, 20, dtype=torch.float64).requires_grad_() for _ in range(2))
    s = torch.tensor(1.0, dtype=torch.float64)
    settings = {"estimator": "unbiased"} if loss == "mmd" else {"normalized": False}
    less = torch.eye(9, dtype=torch.float64)

    def off_diagonal(t: Tensor) -> Tensor:
        return (kernel(t, t, s) * (1 - less)).sum() / 72

    if loss == "mmd":
        want = off_diagonal(x) + off_diagonal(y) - 2 * kernel(x, y, s).mean()
    else:
        want = direct_hsic(x, y, s)
    short = [t.detach().float().requires_grad_() for t in (x, y)]
    found = getattr(mk, loss)(*short, bandwidth=1.0, backend=backend, **settings)
    pairs = zip(torch.autograd.grad(found, short), torch.autograd.grad(want, (x, y)), strict=True)
    for g, w in [(found.detach(), want.detach()), *pairs]:
        assert (g.double() - w).norm() < 1e-4 * w.norm()
