"""Gaussian CLUB against the B x B x D formula in fp64: values, gradients, offsets, dtypes, memory, errors."""

import pytest
import torch

from mi_kernels import backends
from mi_kernels.ops.club.api import gaussian_club

SHAPES = [(1, 1), (2, 1), (7, 3), (63, 65), (64, 64), (3, 130, 67), (2, 3, 5, 4), (1500, 5)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    reason = backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def draw(shape, dtype=torch.float64, offset=0.0, variances=True):
    y = torch.randn(shape, dtype=torch.float64)
    mu = 0.6 * y + 0.8 * torch.randn(shape, dtype=torch.float64) + offset
    logvar = 0.7 * torch.randn(shape, dtype=torch.float64) if variances else None
    leaves = (mu, logvar, y + offset)
    return tuple(None if t is None else t.to(dtype).requires_grad_() for t in leaves)


def pairwise(mu, logvar, y):
    """CLUB as the public code computes it, with a B x B x D intermediate."""
    mu, y = mu.double(), y.double()
    w = torch.ones_like(mu) if logvar is None else (-logvar.double()).exp()
    apart = (y.unsqueeze(-3) - mu.unsqueeze(-2)).square().mean(-2)
    return ((apart - (y - mu).square()) * w / 2).sum(-1).mean(-1)


def gradients(value, leaves):
    return torch.autograd.grad(value.sum(), [t for t in leaves if t is not None])


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variances", [True, False])
def test_equals_the_formula_over_all_pairs(backend, shape, variances):
    leaves = draw(shape, variances=variances)
    got, want = gaussian_club(*leaves, backend=backend), pairwise(*leaves)
    assert got.shape == shape[:-2]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    for g, w in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-13)


def test_negatives_without_the_own_sample(backend):
    mu, logvar, y = draw((9, 3))
    log_density = -((y[None] - mu[:, None]).square() / logvar.exp()[:, None]).sum(-1) / 2
    others = log_density.masked_fill(torch.eye(9, dtype=torch.bool), 0).sum() / (9 * 8)
    got = gaussian_club(mu, logvar, y, negatives="others", backend=backend)
    torch.testing.assert_close(got, log_density.diagonal().mean() - others)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("variances", [True, False])
def test_fp32_stays_accurate_far_from_the_origin(backend, offset, variances):
    leaves = draw((300, 20), torch.float32, offset, variances)
    got, want = gaussian_club(*leaves, backend=backend), pairwise(*leaves)
    assert error(got, want) < 1e-6
    for g, w in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert error(g, w) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_inputs_are_accumulated_in_fp32(backend, dtype):
    leaves = draw((150, 40), dtype)
    got, want = gaussian_club(*leaves, backend=backend), pairwise(*leaves)
    assert got.dtype == torch.float32
    assert error(got, want) < 1e-6
    rounding = 2 ** -(9 if dtype == torch.bfloat16 else 12)
    # without a factor, fp16 gradients of a mean over 150 samples would be partly subnormal
    for g, w in zip(gradients(got * 256, leaves), gradients(want * 256, leaves), strict=True):
        assert g.dtype == dtype
        assert error(g, w) < 2 * rounding


def test_promotes_unlike_dtypes(backend):
    mu, logvar, y = draw((12, 3), torch.float32)
    half = y.detach().bfloat16()
    torch.testing.assert_close(
        gaussian_club(mu, logvar, half, backend=backend), gaussian_club(mu, logvar, half.float(), backend=backend)
    )


@pytest.mark.parametrize("logvar", [-95.0, 95.0])
def test_extreme_variances_do_what_exp_does(backend, logvar):
    mu, _, y = draw((8, 2), torch.float32)
    value = gaussian_club(mu, torch.full_like(mu, logvar), y, backend=backend)
    if logvar > 0:
        assert abs(value) < 1e-30
    else:
        assert not torch.isfinite(value)


def test_a_nan_shows(backend):
    mu, logvar, y = (t.detach().clone() for t in draw((8, 3), torch.float32))
    mu[4, 1] = torch.nan
    assert gaussian_club(mu, logvar, y, backend=backend).isnan()


def test_gradcheck_twice(backend):
    leaves = draw((2, 5, 3))
    run = lambda *a: gaussian_club(*a, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    mu, _, y = leaves
    assert torch.autograd.gradgradcheck(lambda a, b: gaussian_club(a, None, b, backend=backend), (mu, y))


def test_opcheck_accepts_the_operators(backend):
    mu, logvar, y = (t.detach() for t in draw((2, 6, 3)))
    ops = torch.ops.mi_kernels
    for lv, needs in ((logvar, 7), (None, 5)):
        _, moments = ops.club_forward(mu, lv, y, backend)
        torch.library.opcheck(ops.club_forward.default, (mu, lv, y, backend))
        g = torch.rand(2, dtype=torch.float64)
        torch.library.opcheck(ops.club_backward.default, (mu, lv, y, moments, g, needs, backend))


def test_compiles_in_one_graph(backend):
    leaves = draw((3, 11, 4), torch.float32)

    def run(mu, logvar, y):
        return gaussian_club(mu, logvar, y, backend=backend).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), run(*leaves))
    for g, w in zip(gradients(compiled(*leaves), leaves), gradients(run(*leaves), leaves), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.usefixtures("two_threads")
def test_the_bits_are_the_same_twice_and_on_any_number_of_threads(backend):
    leaves = draw((2, 700, 70), torch.float32)

    def run():
        value = gaussian_club(*leaves, backend=backend)
        return value, *gradients(value, leaves)

    first, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = run()
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_permuting_the_batch_changes_nothing(backend):
    mu, logvar, y = draw((90, 6))
    order = torch.randperm(90)
    shuffled = gaussian_club(mu[order], logvar[order], y[order], backend=backend)
    torch.testing.assert_close(shuffled, gaussian_club(mu, logvar, y, backend=backend))


def test_inputs_may_be_strided_or_expanded(backend):
    mu, logvar, y = (t.detach() for t in draw((10, 6)))
    want = gaussian_club(mu, logvar[:1].expand(10, 6).contiguous(), y, backend=backend)
    got = gaussian_club(mu.T.contiguous().T, logvar[:1].expand(10, 6), torch.stack([y, y], -1)[..., 1], backend=backend)
    torch.testing.assert_close(got, want)


def test_only_the_gradients_that_are_wanted(backend):
    mu, logvar, y = (t.detach() for t in draw((10, 6)))
    mu.requires_grad_()
    (g,) = torch.autograd.grad(gaussian_club(mu, logvar, y, backend=backend), mu)
    torch.testing.assert_close(g, torch.autograd.grad(pairwise(mu, logvar, y), mu)[0])


def test_memory_kept_for_backward_is_the_inputs_and_a_few_rows(backend):
    leaves = draw((400, 16), torch.float32)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        gaussian_club(*leaves, backend=backend)
    assert total == 3 * 400 * 16 * 4 + 5 * 16 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.zeros(3)}, "mu must have shape"),
        ({"mu": torch.zeros(0, 3)}, "not be empty"),
        ({"mu": torch.zeros(4, 3, dtype=torch.long)}, "mu must be float"),
        ({"y": torch.zeros(5, 3)}, "y must have the shape of mu"),
        ({"y": torch.zeros(4, 3, device="meta")}, "y is on meta"),
        ({"logvar": torch.zeros(4, 1)}, "logvar must have the shape of mu"),
        ({"negatives": "some"}, "negatives must be one of"),
        ({"mu": torch.zeros(1, 3), "y": torch.zeros(1, 3), "negatives": "others"}, "needs at least two samples"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"mu": torch.zeros(4, 3), "logvar": None, "y": torch.zeros(4, 3), **change}
    with pytest.raises(ValueError, match=message):
        gaussian_club(**arguments)
    with pytest.raises(TypeError, match="mu must be a tensor"):
        gaussian_club([1.0], None, torch.zeros(4, 3))


def test_equal_variances_leave_no_rounding_of_the_spread(backend):
    """The terms v - c_i^2 sum to 0. If they were computed, their rounding error would be 1000 times that of this
    value."""
    y = torch.randn(65, 3)
    mu = 1e-9 * torch.randn(65, 3) + y.mean(0)
    found = gaussian_club(mu, None, y, backend=backend)
    want = ((mu.double() - y.double().mean(0)) * (y.double() - y.double().mean(0))).sum(-1).mean()
    assert abs(found.double() - want) < 1e-5 * (mu.double() - y.double().mean(0)).norm() * y.norm() / 65
