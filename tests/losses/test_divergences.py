"""MMD, MMD to a standard normal, and HSIC: fp64 formulas over all pairs, and closed forms for Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.rbf import api as rbf_api
from mi_kernels.ops.rbf import dispatch as rbf_dispatch
from mi_kernels.ops.rbf import hsic as hsic_formulas

BACKENDS = ["reference", "chunked", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = mk.backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def kernel(a: Tensor, b: Tensor, *bandwidths: float) -> Tensor:
    distance = (a.double().unsqueeze(-2) - b.double().unsqueeze(-3)).square().sum(-1)
    return torch.stack([(-distance / (2 * s**2)).exp() for s in bandwidths]).mean(0)


def naive_mmd(x: Tensor, y: Tensor, *bandwidths: float, unbiased: bool = False) -> Tensor:
    xx, yy, xy = (kernel(*pair, *bandwidths) for pair in ((x, x), (y, y), (x, y)))
    if not unbiased:
        return (xx.mean((-2, -1)) + yy.mean((-2, -1))) - 2 * xy.mean((-2, -1))
    off = lambda k: (k.sum((-2, -1)) - k.shape[-1]) / (k.shape[-1] * (k.shape[-1] - 1))  # noqa: E731
    return off(xx) + off(yy) - 2 * xy.mean((-2, -1))


def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64) + shift).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    "shapes", [((1, 3), (1, 3)), ((7, 5), (130, 5)), ((3, 64, 65), (3, 129, 65)), ((2, 2, 33, 4), (2, 2, 6, 4))]
)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("bandwidths", [(1.7,), (0.8, 2.0, 5.0)])
def test_mmd_equals_the_formula_over_all_pairs(backend, shapes, estimator, bandwidths):
    x, y = draw(*shapes[0]), draw(*shapes[1], shift=0.5)
    if estimator == "unbiased" and min(x.shape[-2], y.shape[-2]) < 2:
        pytest.skip("needs two rows")
    bandwidth = bandwidths if len(bandwidths) > 1 else bandwidths[0]
    got = mk.mmd(x, y, bandwidth=bandwidth, estimator=estimator, backend=backend)
    want = naive_mmd(x, y, *bandwidths, unbiased=estimator == "unbiased")
    assert got.shape == x.shape[:-2]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    for g, w in zip(torch.autograd.grad(got.sum(), (x, y)), torch.autograd.grad(want.sum(), (x, y)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_sided_gradients(backend, wanted):
    x, y = draw(70, 9), draw(81, 9, shift=0.3)
    leaves = [t.detach().requires_grad_(w) for t, w in zip((x, y), wanted, strict=True)]
    kept = next(t for t in leaves if t.requires_grad)
    (g,) = torch.autograd.grad(mk.mmd(*leaves, bandwidth=2.0, backend=backend), kept)
    torch.testing.assert_close(g, torch.autograd.grad(naive_mmd(*leaves, 2.0), kept)[0])


def test_bandwidth_may_be_learned_or_differ_by_group(backend):
    x, y = draw(3, 20, 4), draw(3, 25, 4, shift=0.4)
    s = torch.tensor([0.7, 1.5, 4.0], dtype=torch.float64, requires_grad=True)
    got = mk.mmd(x, y, bandwidth=s, backend=backend)
    one = [mk.mmd(x[i], y[i], bandwidth=s[i].item(), backend=backend) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(one))
    assert torch.autograd.gradcheck(lambda s: mk.mmd(x.detach(), y.detach(), bandwidth=s, backend=backend), s)
    single = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: mk.mmd(x.detach(), y.detach(), bandwidth=[s, 2.0], backend=backend), single
    )


def test_second_derivatives(backend):
    x, y, s = draw(2, 5, 3), draw(2, 4, 3), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, y, s: mk.mmd(x, y, bandwidth=s, backend=backend), (x, y, s))
    assert torch.autograd.gradgradcheck(lambda z, s: mk.gaussian_mmd(z, bandwidth=s, backend=backend), (x, s))
    assert torch.autograd.gradgradcheck(lambda x, y, s: mk.hsic(x[:, :4], y, bandwidth=s), (x, y, s))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("depth", [8, 256])
@pytest.mark.parametrize("flat", [False, True])
def test_fp32_stays_accurate_near_the_null(backend, offset, depth, flat):
    """Both samples come from the same distribution. `flat`: MFM's bandwidth, at which all kernel values are near 1."""
    x, y = draw(90, depth, dtype=torch.float32, shift=offset), draw(130, depth, dtype=torch.float32, shift=offset)
    s = depth / math.sqrt(2) if flat else math.sqrt(2 * depth)
    got, want = mk.mmd(x, y, bandwidth=s, backend=backend), naive_mmd(x, y, s)
    assert want < 0.02
    assert abs(got - want) < 5e-5 * want
    for g, w in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        assert (g - w).norm() < 2e-5 * w.norm()


def test_mmd_of_a_sample_with_itself_is_zero(backend):
    x = draw(150, 20, dtype=torch.float32)
    assert abs(mk.mmd(x, x.detach().clone(), bandwidth=4.0, backend=backend)) < 1e-8


def test_short_inputs_cost_only_their_own_rounding(backend):
    x, y = draw(90, 12, dtype=torch.bfloat16), draw(80, 12, dtype=torch.bfloat16, shift=0.3)
    got, want = mk.mmd(x, y, bandwidth=3.0, backend=backend), naive_mmd(x, y, 3.0)
    assert got.dtype == torch.float32
    assert abs(got - want) < 1e-5 * want
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    wants = torch.autograd.grad(naive_mmd(*wide, 3.0), wide)
    for g, w in zip(torch.autograd.grad(got, (x, y)), wants, strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.double() - w).norm() < 2**-8 * w.norm()


def gaussian_kernel_mean(variance: float, shift: float, depth: int, s: float) -> float:
    """E k(a, b) if a - b is distributed as N(shift, variance) in each of `depth` dimensions."""
    return (1 + variance / s**2) ** (-depth / 2) * math.exp(-depth * shift**2 / (2 * (s**2 + variance)))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.0, 1.5)])
def test_expectation_between_gaussians(shift, scale):
    depth, s, repeats = 5, 2.0, 400
    x, y = draw(repeats, 40, depth).detach(), draw(repeats, 50, depth, scale=scale, shift=shift).detach()
    mean = lambda v, m: gaussian_kernel_mean(v, m, depth, s)  # noqa: E731
    exact = mean(2, 0) + mean(2 * scale**2, 0) - 2 * mean(1 + scale**2, shift)
    values = mk.mmd(x, y, bandwidth=s, estimator="unbiased")
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(repeats)
    biased = exact + (1 - mean(2, 0)) / 40 + (1 - mean(2 * scale**2, 0)) / 50
    values = mk.mmd(x, y, bandwidth=s)
    assert abs(values.mean() - biased) < 4 * values.std() / math.sqrt(repeats)
    assert (values > 0).all()


def test_the_median_heuristic_is_deterministic_symmetric_and_scales():
    x, y = draw(40, 6).detach(), draw(60, 6, shift=1.0).detach()
    pooled = torch.cat([x, y])
    exact = torch.pdist(pooled).median().item()
    value = mk.mmd(x, y)
    torch.testing.assert_close(value, naive_mmd(x, y, exact))
    assert torch.equal(mk.mmd(x, y), value)
    torch.testing.assert_close(mk.mmd(y, x), value)
    torch.testing.assert_close(mk.mmd(1000 * x, 1000 * y), value)
    large = draw(5000, 3, scale=2.0).detach()
    s = mk.losses.divergences.median_distance(large[None])
    assert s.item() == pytest.approx(torch.pdist(large[:400]).median().item(), rel=0.1)


def test_constant_samples_have_no_discrepancy():
    x = torch.full((9, 4), 3.7, requires_grad=True)
    for value in (
        mk.mmd(x, x.detach()),
        mk.hsic(x, torch.randn(9, 2)),
        mk.hsic(torch.randn(9, 2), x, normalized=False),
    ):
        assert value.item() == 0
        (g,) = torch.autograd.grad(value, x)
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("shape", [(50, 3), (2, 33, 8)])
@pytest.mark.parametrize("bandwidth", [None, 1.5])
def test_gaussian_mmd_is_the_expectation_over_the_prior(backend, shape, bandwidth):
    z = draw(*shape, shift=0.2)
    depth = shape[-1]
    s = depth / math.sqrt(2) if bandwidth is None else bandwidth
    got = mk.gaussian_mmd(z, bandwidth=bandwidth, backend=backend)
    to_prior = (1 + 1 / s**2) ** (-depth / 2) * (-z.square().sum(-1) / (2 * (s**2 + 1))).exp()
    want = kernel(z, z, s).mean((-2, -1)) + (1 + 2 / s**2) ** (-depth / 2) - 2 * to_prior.mean(-1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), z)[0] for v in (got, want)))
    prior = torch.randn(*shape[:-2], 70, depth, dtype=torch.float64)
    sampled = mk.gaussian_mmd(z, bandwidth=bandwidth, prior_samples=prior, backend=backend)
    torch.testing.assert_close(sampled, naive_mmd(z, prior, s))


def test_mfms_published_magnitudes():
    """With a sampled prior, MMD is about 4 / (B D) if both distributions are equal, and about 2 / D if z is shifted by
    1 in every dimension."""
    for depth, batch, null in ((32, 32, 3.82e-3), (80, 128, 3.91e-4), (256, 128, 1.21e-4)):
        z, prior = torch.randn(50, batch, depth), torch.randn(50, batch, depth)
        sampled = mk.gaussian_mmd(z, prior_samples=prior).mean().item()
        assert sampled == pytest.approx(null, rel=0.05)
        expected = (1 - (1 + 4 / depth**2) ** (-depth / 2)) / batch
        values = mk.gaussian_mmd(z)
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(50)
        assert mk.gaussian_mmd(z + 1, prior_samples=prior).mean().item() == pytest.approx(2 / depth, rel=0.08)


@pytest.mark.parametrize("depth", [32, 256])
def test_gaussian_mmd_keeps_its_digits_at_the_null_in_fp32(backend, depth):
    z = draw(128, depth, dtype=torch.float32)
    got, want = mk.gaussian_mmd(z, backend=backend), mk.gaussian_mmd(z.double(), backend="reference")
    assert want < 1e-2
    assert abs(got - want) < 5e-5 * want
    g, w = (torch.autograd.grad(v, z)[0] for v in (got, want))
    assert (g - w).norm() < 2e-5 * w.norm()


def test_gradient_of_mfms_mmd_is_the_published_formula():
    z, prior = draw(20, 6), draw(20, 6).detach()
    value = mk.gaussian_mmd(z, prior_samples=prior)
    s = 6 / math.sqrt(2)
    apart = lambda a, b: (kernel(a, b, s).unsqueeze(-1) * (b[None] - a[:, None])).sum(0)  # noqa: E731
    want = 4 / (20**2 * 6**2) * (apart(prior, z) - apart(z, z))
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], want.detach())


def naive_hsic(x: Tensor, y: Tensor, sx: float, sy: float) -> Tensor:
    batch = x.shape[-2]
    h = torch.eye(batch, dtype=torch.float64) - 1 / batch
    k, m = h @ kernel(x, x, sx) @ h, h @ kernel(y, y, sy) @ h
    return (k * m).sum((-2, -1)) / batch**2


@pytest.mark.parametrize("shape", [(2,), (31,), (3, 20)])
@pytest.mark.parametrize("normalized", [True, False])
def test_hsic_equals_the_trace_of_centred_kernels(monkeypatch, shape, normalized):
    monkeypatch.setattr("mi_kernels.ops.rbf.dispatch.CHUNK_BYTES", 8 * 4 * 20 * 7)
    x, y = draw(*shape, 4), draw(*shape, 3)
    got = mk.hsic(x, y, bandwidth=(1.5, 0.8), normalized=normalized)
    want = naive_hsic(x, y, 1.5, 0.8)
    if normalized:
        want = want / (naive_hsic(x, x, 1.5, 1.5) * naive_hsic(y, y, 0.8, 0.8)).sqrt()
    assert got.shape == shape[:-1]
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), (x, y)), torch.autograd.grad(want.sum(), (x, y)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12)


def test_hsic_of_a_variable_with_itself_is_one_and_sees_dependence():
    x, noise = draw(200, 3).detach(), draw(200, 3).detach()
    assert mk.hsic(x, x).item() == pytest.approx(1)
    assert mk.hsic(x, 5 * x + 2).item() == pytest.approx(1)
    assert 0 < mk.hsic(x, noise) < 0.1 < mk.hsic(x, x.square() + 0.1 * noise) < 1


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_hsic_stays_accurate_in_fp32_and_short_dtypes(offset):
    x, y = draw(300, 16, dtype=torch.float32, shift=offset), draw(300, 8, dtype=torch.float32, shift=offset)
    want = naive_hsic(x, y, 4.0, 3.0)
    assert abs(mk.hsic(x, y, bandwidth=(4.0, 3.0), normalized=False) - want) < 2e-5 * want
    short = x.detach().bfloat16(), y.detach().bfloat16()
    want = naive_hsic(*short, 4.0, 3.0)
    assert abs(mk.hsic(*short, bandwidth=(4.0, 3.0), normalized=False) - want) < 2e-5 * want + 1e-12


@pytest.mark.parametrize("name", ["mmd", "gaussian_mmd", "hsic"])
def test_memory_kept_for_backward_is_linear_in_the_batch(name):
    def saved(batch: int) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x, y = torch.randn(batch, 8, requires_grad=True), torch.randn(batch, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = mk.gaussian_mmd(x) if name == "gaussian_mmd" else getattr(mk, name)(x, y, bandwidth=2.0)
        nodes = [loss.grad_fn]
        for node in nodes:  # gradients that a node holds as attributes are not among its saved tensors
            nodes += [n for n, _ in node.next_functions if n is not None]
            for t in getattr(node, "gradients", ()):
                if t is not None:
                    pack(t)
        return sum(seen.values())

    small, large = saved(256), saved(1024)
    assert large <= 4.2 * small
    assert large < 1024 * 1024 * 4 / 8


def test_permuting_the_batch_changes_nothing(backend):
    x, y, order = draw(90, 5).detach(), draw(90, 5).detach(), torch.randperm(90)
    torch.testing.assert_close(mk.mmd(x[order], y, backend=backend), mk.mmd(x, y, backend=backend))
    torch.testing.assert_close(mk.gaussian_mmd(x[order], backend=backend), mk.gaussian_mmd(x, backend=backend))
    torch.testing.assert_close(mk.hsic(x[order], y[order]), mk.hsic(x, y))


@pytest.mark.usefixtures("two_threads")
def test_results_are_the_same_bits_twice(backend):
    x, y = draw(200, 30, dtype=torch.float32), draw(170, 30, dtype=torch.float32)

    def run():
        value = mk.mmd(x, y, backend=backend)
        return value, *torch.autograd.grad(value, (x, y))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mmd", "gaussian_mmd", "hsic"])
def test_compiles_in_one_graph(name):
    x, y = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 9, 4, requires_grad=True)

    def run(x, y):
        return (mk.gaussian_mmd(x) if name == "gaussian_mmd" else getattr(mk, name)(x, y)).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), run(x, y))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), x), torch.autograd.grad(run(x, y), x))


def test_hsic_is_an_operator_with_backends(backend):
    x, y, sx, sy = draw(2, 9, 3).detach(), draw(2, 9, 2).detach(), 1 + torch.rand(2).double(), torch.rand(2).double()
    ops = torch.ops.mi_kernels
    _, rows = ops.rbf_hsic(x, y, sx, sy, backend)
    torch.library.opcheck(ops.rbf_hsic.default, (x, y, sx, sy, backend))
    for needs in (15, 6, 1):
        arguments = (x, y, sx, sy, rows, torch.rand(2, 3).double(), needs, backend)
        torch.library.opcheck(ops.rbf_hsic_grad.default, arguments)
    torch.testing.assert_close(mk.hsic(x, y, backend=backend), mk.hsic(x, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "other"), [((1, 3), 2), ((64, 5), 64), ((131, 70), 3), ((2, 97, 129), 33), ((3, 30, 4), 1)]
)
def test_hsic_and_its_gradients_equal_the_materialised_definition(backend, shape, other, dtype):
    """The three traces, and all gradients of a random combination of them, at sizes of several tiles."""
    x, y = draw(*shape).detach().to(dtype), draw(*shape[:-1], other).detach().to(dtype)
    x, y = x.reshape(-1, *shape[-2:]), y.reshape(-1, shape[-2], other)
    sx, sy = ((2 * torch.rand(x.shape[0]) / d + 0.02).rsqrt() for d in (shape[-1], other))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.requires_grad_(), y.requires_grad_(), sx.to(wide).requires_grad_(), sy.to(wide).requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.randn(x.shape[0], 3, dtype=torch.float64)
    got, want = rbf_api.hsic(*leaves, backend=backend), hsic_formulas.value(*exact)
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())
    found = torch.autograd.grad((got * weights).sum(), leaves)
    wanted = torch.autograd.grad((want * weights).sum(), exact)
    for g, w, leaf in zip(found, wanted, leaves, strict=True):
        limit = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 1e-2}[leaf.dtype]
        assert g.dtype == leaf.dtype
        assert (g.double() - w).norm() <= limit * w.norm() + 1e-12


def test_a_nan_in_the_samples_shows(backend):
    x, y = draw(70, 3).detach(), draw(70, 2).detach()
    x[5, 1] = math.nan
    for value in (
        mk.hsic(x, y, bandwidth=1.0, backend=backend),
        mk.hsic(y, x, bandwidth=1.0, normalized=False, backend=backend),
        mk.mmd(x, x[:9], bandwidth=1.0, backend=backend),
    ):
        assert value.isnan()


@pytest.mark.usefixtures("two_threads")
def test_hsic_is_the_same_bits_twice(backend):
    x, y = draw(200, 30, dtype=torch.float32), draw(200, 70, dtype=torch.float32)

    def run():
        value = mk.hsic(x, y, backend=backend)
        return value, *torch.autograd.grad(value, (x, y))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_opcheck_accepts_the_operator(backend):
    x, y, s = draw(2, 6, 3).detach(), draw(2, 5, 3).detach(), 0.5 + torch.rand(2, 2, dtype=torch.float64)
    for needs in (0, 7, 1):
        torch.library.opcheck(torch.ops.mi_kernels.rbf_mmd.default, (x, y, s, 0.1, 0.2, -0.3, needs, backend))
    torch.library.opcheck(torch.ops.mi_kernels.rbf_mmd.default, (x, y[:, :0], s, 0.1, 0.0, 0.0, 5, backend))
    torch.library.opcheck(torch.ops.mi_kernels.rbf_median.default, (x,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 3)}, "x must have shape .* not be empty"),
        ({"x": torch.zeros(4, 3, dtype=torch.long)}, "x must be float"),
        ({"y": torch.zeros(4, 2)}, "y .* must agree .* all but the batch"),
        ({"y": torch.zeros(2, 4, 3)}, "y .* must agree"),
        ({"y": torch.zeros(4, 3, device="meta")}, "y must be on the device of x"),
        ({"kernel": "laplace"}, "kernel must be 'rbf'"),
        ({"estimator": "linear"}, "estimator must be one of"),
        ({"estimator": "unbiased", "x": torch.zeros(1, 3)}, "needs two rows"),
        ({"bandwidth": 0.0}, "bandwidth must be positive"),
        ({"bandwidth": []}, "bandwidth must hold"),
        ({"bandwidth": torch.ones(3)}, "bandwidth must be a number"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"x": torch.zeros(5, 3), "y": torch.ones(4, 3), **change}
    with pytest.raises(ValueError, match=message):
        mk.mmd(**arguments)


def test_bad_input_of_the_others_is_refused_by_name():
    x, y = torch.zeros(5, 3), torch.ones(4, 3)
    for call, message in [
        (lambda: mk.hsic(x, y), "y .* must agree .* all but the features"),
        (lambda: mk.hsic(x, x, bandwidth=(1.0, 2.0, 3.0)), "bandwidth must be one for both or a pair"),
        (lambda: mk.gaussian_mmd(x, bandwidth=-1.0), "bandwidth must be positive"),
        (lambda: mk.gaussian_mmd(x, prior_samples=torch.zeros(4, 2)), "prior_samples .* must agree"),
        (lambda: mk.gaussian_mmd(x[0]), "z must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="x must be a tensor"):
        mk.mmd([1.0], y)


def test_no_gradient_is_computed_where_autograd_does_not_record(backend, monkeypatch):
    x, y, asked, run = draw(9, 3), draw(7, 3), [], rbf_dispatch.mmd

    def spy(*arguments):
        asked.append(arguments[6])
        return run(*arguments)

    monkeypatch.setattr(rbf_dispatch, "mmd", spy)
    recorded = mk.mmd(x, y, bandwidth=1.3, backend=backend)
    with torch.no_grad():
        value = mk.mmd(x, y, bandwidth=1.3, backend=backend)
    assert recorded.requires_grad and not value.requires_grad
    torch.testing.assert_close(value, recorded.detach())
    assert asked[0] and asked[1] == 0


def test_going_back_twice_gives_the_same_gradients_whatever_happened_to_the_first(backend):
    x, y = draw(9, 3), draw(7, 3)
    s = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = mk.mmd(x, y, bandwidth=s, backend=backend)
    first = torch.autograd.grad(loss, (x, y, s), retain_graph=True)
    want = [g.clone() for g in first]
    with torch.no_grad():
        for g in first:
            g.zero_()
    again = torch.autograd.grad(3 * loss, (x, y, s), retain_graph=True)
    for g, w in zip(again, want, strict=True):
        torch.testing.assert_close(g, 3 * w)
    assert all(w.count_nonzero() for w in want)
