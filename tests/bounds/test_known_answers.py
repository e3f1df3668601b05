"""The bounds on problems with known answers: constant scores, noisy bits, Gaussians, scores of several hundred."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_kernels.bounds import (
    MINE,
    NWJ,
    SMILE,
    TUBA,
    DonskerVaradhan,
    InterpolatedBound,
    JensenShannon,
    WassersteinDependency,
)
from mi_kernels.critics import BilinearCritic, Critic, DotCritic
from tests.bounds.formulas import BOUNDS, CRITICS, diagonal, js, off, oracle_features, pair


class Shifted(Critic):
    """The scores of another critic plus c."""

    def __init__(self, critic: Critic, c: float):
        super().__init__()
        self.critic, self.c = critic, c

    def statistics(self, x, y, stats=("positive", "row_lse"), pairs="all", *, clip=None):
        assert set(stats) <= {"positive", "row_lse", "col_lse"}
        found = self.critic.statistics(x, y, stats, pairs)
        return type(found)(*(None if t is None else t + self.c for t in found))


def test_donsker_varadhan_is_the_best_nwj_over_constants() -> None:
    critic, (x, y) = CRITICS["dot"](), pair(3)
    best = DonskerVaradhan(critic)(x, y)
    at = (1 - (diagonal(critic(x, y)).mean(-1) - best)).tolist()
    for group, c in enumerate(at):
        one = x[group], y[group]
        assert NWJ(Shifted(critic, c))(*one).item() == pytest.approx(best[group].item(), abs=1e-12)
        for step in (-0.5, -0.05, 0.05, 0.5):
            assert NWJ(Shifted(critic, c + step))(*one) < best[group] - 1e-4
        assert TUBA(Shifted(critic, c - 1))(*one).item() == pytest.approx(best[group].item(), abs=1e-12)
        assert DonskerVaradhan(Shifted(critic, 3.0))(*one).item() == pytest.approx(best[group].item(), abs=1e-12)


@pytest.mark.parametrize("c", [-2.0, 0.0, 1.0, 1.5])
def test_constant_scores_know_nothing(c: float) -> None:
    zero = BilinearCritic(4, 4).double()
    nn.init.zeros_(zero.weight)
    x, y = pair()
    constant = Shifted(zero, c)
    assert DonskerVaradhan(constant)(x, y).item() == pytest.approx(0, abs=1e-14)
    assert NWJ(constant)(x, y).item() == pytest.approx(c - math.exp(c - 1), abs=1e-14)
    assert TUBA(constant)(x, y).item() == pytest.approx(1 + c - math.exp(c), abs=1e-14)
    for build in (MINE, JensenShannon, SMILE, InterpolatedBound, WassersteinDependency):
        assert build(zero)(x, y).item() == pytest.approx(0, abs=1e-14)
    assert JensenShannon(zero).learning_loss(x, y).item() == pytest.approx(2 * math.log(2))
    assert JensenShannon(zero).divergence(x, y).item() == pytest.approx(0, abs=1e-14)


def gaussians(repeats: int, batch: int, mi: float, d: int = 20) -> tuple[Tensor, Tensor]:
    rho = math.sqrt(1 - math.exp(-2 * mi / d))
    x = torch.randn(repeats, batch, d, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn_like(x)
    return oracle_features(x, y, rho)


def test_bounds_of_the_true_critic_are_the_mutual_information() -> None:
    x, y = gaussians(repeats=16, batch=512, mi=2.0)
    true, above = DotCritic(), Shifted(DotCritic(), 1.0)
    cases = {
        "tuba": (TUBA(true), 2.0),
        "nwj": (NWJ(true), 2.0 - 1 / math.e),
        "nwj one above": (NWJ(above), 2.0),
        "dv": (DonskerVaradhan(true), 2.0),
        "js": (JensenShannon(true), 2.0),
        "smile": (SMILE(true, clip=math.inf), 2.0),
    }
    for name, (bound, expected) in cases.items():
        values = bound(x, y)
        error = values.std().item() / 4
        assert error < 0.03, name
        assert values.mean().item() == pytest.approx(expected, abs=4 * error), name


@pytest.mark.parametrize(("mi", "d", "batch"), [(0.5, 4, 8), (1.0, 20, 16)])
def test_the_variance_of_nwj_under_the_true_critic_is_known(mi: float, d: int, batch: int) -> None:
    """Var_P log r = d rho^2 and Var_Q r = e^2I - 1. Within a batch, the negative pairs (i, j) and (j, i) are dependent:
    E r(x_i, y_j) r(x_j, y_i) = (1 - rho^4)^-d, by Hermite expansion. All other negative pairs are uncorrelated."""
    rho2 = 1 - math.exp(-2 * mi / d)
    x, y = gaussians(repeats=12_000, batch=batch, mi=mi, d=d)
    values = NWJ(Shifted(DotCritic(), 1.0))(x, y)
    strangers = math.exp(2 * mi) - 1 + (1 - rho2**2) ** -d - 1
    expected = d * rho2 / batch + strangers / (batch * (batch - 1))
    blocks = (values - mi).square().view(40, -1).mean(-1)
    error = blocks.std().item() / math.sqrt(40)
    assert error < 0.1 * expected
    assert values.var().item() == pytest.approx(expected, abs=4 * error)
    # the test can tell this formula from one without the negatives' term
    assert abs(values.var().item() - d * rho2 / batch) > 8 * error
    assert values.mean().item() == pytest.approx(mi, abs=4 * math.sqrt(expected / 12_000))


def test_js_trained_critics_are_valued_without_the_offset_of_nwj() -> None:
    """At log r, the optimum of the JS objective, NWJ is 1 / e too small; the value that JensenShannon reports is
    not."""
    x, y = gaussians(repeats=16, batch=512, mi=2.0)
    true = DotCritic()
    difference = JensenShannon(true)(x, y) - NWJ(true)(x, y)
    assert difference.mean().item() == pytest.approx(1 / math.e, abs=0.02)
    # log r maximises the JS objective: shifting the scores up or down lowers it
    base, (a, b) = js(true(x, y)).mean(), (js(true(x, y) + c).mean() for c in (-0.3, 0.3))
    assert base > a and base > b


def loo_interpolated(s: Tensor, alpha: float) -> Tensor:
    """The interpolated bound as in the published notebook, with rows as the conditioning variable: the logarithm is
    averaged over the choice of the negative that the positive replaces."""
    b = s.shape[-1]
    values = []
    for i in range(b):
        row = s[i].exp()
        others = [j for j in range(b) if j != i]
        for j in others:
            m = row[[k for k in range(b) if k != j]].mean()
            values.append(s[i, i] - (alpha * m + 1 - alpha).log())
    strangers = off(s).exp().mean(-1)
    product = (off(s).exp() / (alpha * strangers + 1 - alpha)[:, None]).mean()
    return 1 + torch.stack(values).mean() - product


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_interpolated_bound_lies_just_below_its_leave_one_out_form(alpha: float) -> None:
    critic = CRITICS["dot"]()
    for batch, gap in ((2, 1e-12), (12, 0.2)):
        x, y = pair(batch=batch)
        ours = InterpolatedBound(critic, alpha=alpha)(x, y)
        published = loo_interpolated(critic(x, y).T, alpha)
        assert published - gap < ours < published + 1e-12
        if alpha == 0:
            torch.testing.assert_close(ours, TUBA(critic)(x, y))


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0])
def test_the_interpolated_bound_stays_below_the_mutual_information(alpha: float) -> None:
    x, y = gaussians(repeats=64, batch=64, mi=2.0)
    values = InterpolatedBound(DotCritic(), alpha=alpha)(x, y)
    assert values.mean() < 2.0 + 3 * values.std() / 8
    assert values.mean() > 1.7
    x, y = gaussians(repeats=4, batch=16, mi=10.0)
    ceiling = 1 + math.log(15 / alpha)
    assert (InterpolatedBound(DotCritic(), alpha=alpha)(x, y) <= ceiling).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", BOUNDS)
def test_scores_of_500_give_finite_values_and_gradients(name: str, sign: int, dtype: torch.dtype) -> None:
    bound = BOUNDS[name][0](DotCritic())
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=dtype).requires_grad_()
    y = (sign * 500 * x).detach().requires_grad_()
    for _ in range(2):
        for value in (bound(x, y), bound.learning_loss(x, y)):
            assert value.isfinite()
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, [x, y]))


def test_an_exponential_that_overflows_continues_along_its_tangent() -> None:
    x, y = torch.ones(2, 1), torch.full((2, 1), 20.0)
    assert TUBA(DotCritic())(x, y).item() == pytest.approx(21 - math.exp(20), rel=1e-6)
    # beyond e^80 the exponential continues as its tangent: check value and slope
    t = torch.full((2, 1), 90.0, requires_grad=True)
    value = TUBA(DotCritic())(x, t)
    assert value.item() == pytest.approx(-11 * math.exp(80), rel=1e-5)
    (slope,) = torch.autograd.grad(value, t)
    assert slope.sum().item() == pytest.approx(-math.exp(80), rel=1e-5)


def test_a_critic_table_trained_on_noisy_bits_reaches_their_information() -> None:
    """The counts realise P exactly. The negatives of a finite batch exclude the positive pairs, so the expected value
    uses that Q instead of the product of the marginals."""
    counts = torch.tensor([[82, 18], [18, 82]])
    n = int(counts.sum())
    cells = [(i, j) for i in range(2) for j in range(2) for _ in range(counts[i, j])]
    x, y = (F.one_hot(torch.tensor(side), 2).double() for side in zip(*cells, strict=True))
    p = counts.double() / n
    q = (p.sum(1, keepdim=True) * p.sum(0) * n * n - n * p) / (n * (n - 1))
    information = (p * (p / q).log()).sum().item()
    assert information == pytest.approx(0.221754, abs=5e-3)
    for build in (NWJ, TUBA, DonskerVaradhan, MINE, JensenShannon, lambda c: SMILE(c, clip=50.0)):
        critic = BilinearCritic(2, 2).double()
        bound = build(critic).eval()
        optimizer = torch.optim.LBFGS(critic.parameters(), lr=1.0, max_iter=60, line_search_fn="strong_wolfe")

        def closure(bound=bound, optimizer=optimizer):
            optimizer.zero_grad()
            loss = bound.learning_loss(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert bound(x, y).item() == pytest.approx(information, abs=1e-6), type(bound).__name__
