"""CLUB and its variants: closed forms under the true conditional, formulas over all pairs, and rejected arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mi_kernels as mk

DIM, BATCH, REPEATS = 20, 64, 400


def correlated(rho: float, shape: tuple[int, ...] = (REPEATS, BATCH, DIM)) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(shape, dtype=torch.float64)


def with_true_conditional(bound: torch.nn.Module, rho: float) -> torch.nn.Module:
    """The bound with q(y | x) = p(y | x) of standard Gaussians with correlation rho."""
    logvar = 0.0 if isinstance(bound, mk.CLUBMean) else math.log(1 - rho**2)
    bound.get_mu_logvar = lambda x: (rho * x, torch.full_like(x, logvar))  # type: ignore[assignment]
    if isinstance(bound, mk.CLUBMean):
        bound.p_mu = torch.nn.Linear(DIM, DIM, bias=False).double()
        with torch.no_grad():
            bound.p_mu.weight.copy_(rho * torch.eye(DIM))
    return bound


def assert_expectation(values: Tensor, expected: float) -> None:
    assert abs(values.mean().item() - expected) < 4 * values.std().item() / math.sqrt(values.numel())


@pytest.mark.parametrize(("mi", "expected"), [(2, 4.428), (4, 9.836), (6, 16.44), (8, 24.51), (10, 34.37)])
@pytest.mark.parametrize("kind", [mk.CLUB, mk.CLUBSample])
@pytest.mark.parametrize("negatives", ["all", "others"])
def test_expectation_with_the_true_conditional(kind: type, negatives: str, mi: float, expected: float) -> None:
    """E CLUB = d rho^2 / (1 - rho^2) = d (e^(2 I / d) - 1), times (B - 1) / B if j = i counts as a negative."""
    rho = math.sqrt(1 - math.exp(-2 * mi / DIM))
    exact = DIM * rho**2 / (1 - rho**2)
    assert exact == pytest.approx(expected, rel=5e-4)
    bound = with_true_conditional(kind(DIM, DIM, 4, negatives=negatives), rho)
    with torch.no_grad():
        values = bound(*correlated(rho))
    assert values.shape == (REPEATS,)
    assert_expectation(values, exact * ((BATCH - 1) / BATCH if negatives == "all" else 1))
    published = {2: (0.31, 0.42), 6: (0.82, 1.10), 10: (1.53, 2.03)}
    if negatives == "all" and mi in published:
        std = published[mi][kind is mk.CLUBSample]
        assert values.std().item() == pytest.approx(std, rel=0.15)


def test_expectation_of_club_mean() -> None:
    """CLUBMean has unit variances; with mu = rho x its expectation is rho^2 per dimension."""
    rho = 0.8
    values = with_true_conditional(mk.CLUBMean(DIM, DIM, negatives="others"), rho)(*correlated(rho))
    assert_expectation(values.detach(), DIM * rho**2)


@pytest.mark.parametrize("kind", [mk.CLUB, mk.CLUBSample, mk.CLUBMean])
def test_independent_samples_carry_nothing(kind: type) -> None:
    bound = kind(DIM, DIM, 8, negatives="others").double()
    x, y = torch.randn(REPEATS, BATCH, DIM).double(), torch.randn(REPEATS, BATCH, DIM).double()
    with torch.no_grad():
        assert_expectation(bound(x, y), 0.0)


@pytest.mark.parametrize("kind", [mk.CLUB, mk.CLUBMean])
@pytest.mark.parametrize("groups", [None, 3])
def test_equals_the_mean_over_all_pairs(kind: type, groups: int | None) -> None:
    bound = kind(4, 5, 6, groups=groups).double()
    x, y = torch.randn(3, 7, 4).double().requires_grad_(), torch.randn(3, 7, 5).double().requires_grad_()
    mu, logvar = bound.get_mu_logvar(x)
    pairs = (y[:, None] - mu[:, :, None]).square() / logvar.exp()[:, :, None] + logvar[:, :, None]
    log_density = -0.5 * (pairs.sum(-1) + 5 * math.log(2 * math.pi))
    own = log_density.diagonal(dim1=1, dim2=2)
    value, want = bound(x, y), own.mean(-1) - log_density.mean((1, 2))
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(bound.loglikeli(x, y), own.mean(-1))
    torch.testing.assert_close(bound.learning_loss(x, y), -own.mean(-1))
    of = [x, y, *bound.parameters()]
    got = torch.autograd.grad(value.sum(), of, retain_graph=True, allow_unused=True)
    for g, w in zip(got, torch.autograd.grad(want.sum(), of, allow_unused=True), strict=True):
        torch.testing.assert_close(
            torch.zeros(()).double() if g is None else g, torch.zeros(()).double() if w is None else w
        )


@pytest.mark.parametrize("kind", [mk.CLUB, mk.CLUBSample, mk.CLUBMean])
def test_groups_are_independent_problems(kind: type) -> None:
    together = kind(4, 3, 6, groups=2)
    x, y = torch.randn(2, 9, 4), torch.randn(2, 9, 3)
    for i in range(2):
        alone = kind(4, 3, 6)
        alone.load_state_dict({k: v[i] for k, v in together.state_dict().items()})
        torch.testing.assert_close(alone.learning_loss(x[i], y[i]), together.learning_loss(x, y)[i])
        if kind is not mk.CLUBSample:
            torch.testing.assert_close(alone(x[i], y[i]), together(x, y)[i])


def test_a_bound_of_one_is_the_public_tanh() -> None:
    bound = mk.CLUB(3, 2, 8, logvar_bound=1.0)
    x = 50 * torch.randn(40, 3)
    logvar = bound.get_mu_logvar(x)[1]
    torch.testing.assert_close(logvar, bound.p_logvar(x).tanh())
    wider, free = mk.CLUB(3, 2, 8), mk.CLUB(3, 2, 8, logvar_bound=None)
    for module in (wider, free):
        module.load_state_dict(bound.state_dict())
    assert wider.get_mu_logvar(x)[1].abs().max() > 2
    torch.testing.assert_close(free.get_mu_logvar(x)[1], bound.p_logvar(x))
    assert set(bound.state_dict()) == {
        f"{net}.{i}.{p}" for net in ("p_mu", "p_logvar") for i in (0, 2) for p in ("weight", "bias")
    }


def test_sampled_negatives_never_meet_themselves_when_others_are_asked_for() -> None:
    from mi_kernels.bounds.club import _partners

    generator = torch.Generator().manual_seed(0)
    partner = _partners(torch.Size([300, 5]), "others", torch.device("cpu"), generator)
    assert (partner != torch.arange(5)).all()
    assert torch.equal(partner.sort(-1).values, torch.arange(5).expand(300, 5))
    counts = torch.bincount(partner[:, 0], minlength=5)
    assert counts[0] == 0 and (counts[1:] > 40).all()  # 75 expected of each; four standard deviations are 30
    loose = _partners(torch.Size([300, 5]), "all", torch.device("cpu"), generator)
    assert (loose == torch.arange(5)).any()


def test_sampling_follows_its_generator() -> None:
    bound, (x, y) = mk.CLUBSample(3, 3, 4), (torch.randn(20, 3), torch.randn(20, 3))
    first, second, third = (bound(x, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("negatives", ["all", "others"])
@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_categorical_equals_the_mean_over_all_pairs(negatives: str, hidden_dim: int | None) -> None:
    bound = mk.CLUBCategorical(4, 5, hidden_dim, negatives=negatives).double()
    x, labels = torch.randn(2, 9, 4).double().requires_grad_(), torch.randint(0, 5, (2, 9))
    log_q = bound.variational_net(x).log_softmax(-1)
    pairs = torch.stack([log_q[i][:, labels[i]] for i in range(2)])
    own = pairs.diagonal(dim1=1, dim2=2)
    every = pairs.mean((1, 2)) if negatives == "all" else (pairs.sum((1, 2)) - own.sum(-1)) / (9 * 8)
    torch.testing.assert_close(bound(x, labels), own.mean(-1) - every)
    torch.testing.assert_close(bound.learning_loss(x, labels), -own.mean(-1))
    (g,) = torch.autograd.grad(bound(x, labels).sum(), x, retain_graph=True)
    torch.testing.assert_close(g, torch.autograd.grad((own.mean(-1) - every).sum(), x)[0])


def test_categorical_with_the_true_conditional() -> None:
    """A label passes a channel that keeps it with probability 1 - e: I_CLUB = (1 - e - 1/C) log odds."""
    classes, error = 4, 0.2
    bound = mk.CLUBCategorical(classes, classes, negatives="others").double()
    odds = math.log((1 - error) / (error / (classes - 1)))
    with torch.no_grad():
        bound.variational_net.weight.copy_(odds * torch.eye(classes))  # type: ignore[operator, union-attr]
        bound.variational_net.bias.zero_()  # type: ignore[operator, union-attr]
    label = torch.randint(0, classes, (REPEATS, BATCH))
    wrong = (label + torch.randint(1, classes, label.shape)) % classes
    seen = torch.where(torch.rand(label.shape) < error, wrong, label)
    values = bound(torch.nn.functional.one_hot(seen, classes).double(), label).detach()
    assert_expectation(values, (1 - error - 1 / classes) * odds)


@pytest.mark.parametrize("kind", [mk.CLUB, mk.CLUBMean, mk.CLUBSample])
def test_compiles_without_graph_breaks(kind: type) -> None:
    module = kind(3, 2, 4)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(x, y)
    if kind is not mk.CLUBSample:
        torch.testing.assert_close(got, module(x, y))
    assert torch.isfinite(got)


def test_autocast_keeps_the_estimate_in_fp32() -> None:
    module, x, y = mk.CLUB(8, 6, 16), torch.randn(50, 8), torch.randn(50, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x, y)
    assert low.dtype == torch.float32
    assert abs(low - module(x, y)) < 0.05


@pytest.mark.parametrize("kind", [mk.CLUB, mk.CLUBSample, mk.CLUBMean])
def test_bad_inputs_are_named(kind: type) -> None:
    module = kind(3, 2, 4)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for arguments, message in [
        ((x[:5], y), "y must have the batch dimensions of x"),
        ((x[:0], y[:0]), "x must be"),
        ((x, y[0]), "y must be"),
        ((y, x), r"x must be \[\*, batch, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*arguments)
        with pytest.raises(ValueError, match=message):
            module.learning_loss(*arguments)
    with pytest.raises(ValueError, match="negatives must be one of"):
        kind(3, 2, 4, negatives="some")
    with pytest.raises(ValueError, match="hidden_dim must be at least 1"):
        kind(3, 2, 0)
    with pytest.raises(ValueError, match=r"needs at least two samples, got (x|mu)"):
        kind(3, 2, 4, negatives="others")(x[:1], y[:1])


def test_bad_labels_and_bounds_are_named() -> None:
    module, x = mk.CLUBCategorical(3, 4), torch.randn(6, 3)
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        module(x, torch.zeros(6))
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        module(x, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got 0 to 4"):
        module.learning_loss(x, torch.tensor([0, 1, 2, 3, 4, 0]))
    with pytest.raises(ValueError, match="logvar_bound must be positive"):
        mk.CLUB(3, 2, 4, logvar_bound=0.0)
