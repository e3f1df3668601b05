"""Bounds with off-diagonal negatives: independent formulas on materialised scores, gradients, closed forms, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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
from mi_kernels.critics import BilinearCritic, ConcatCritic, Critic, DotCritic, SeparableCritic

CRITICS: dict[str, Callable[[], Critic]] = {
    "dot": lambda: DotCritic(temperature=0.7),
    "cosine": lambda: DotCritic(temperature=0.3, normalize=True),
    "bilinear": lambda: BilinearCritic(4, 4),
    "separable": lambda: SeparableCritic(4, 4, hidden_dims=(8, 6), embed_dim=3, activation="gelu"),
    "concat": lambda: ConcatCritic(4, 4, hidden_dims=(8, 6), memory_budget=1),
    "grouped": lambda: ConcatCritic(4, 4, hidden_dims=(8, 6), groups=3),
}
CASES = [(name, lead) for name in CRITICS for lead in ((), (2, 2)) if name != "grouped"] + [("grouped", (3,))]


def off(s: Tensor) -> Tensor:
    """The entries off the diagonal, [*, B, B - 1]."""
    b = s.shape[-1]
    keep = [[j for j in range(b) if j != i] for i in range(b)]
    return s.gather(-1, torch.tensor(keep).expand(*s.shape[:-2], b, b - 1))


def diagonal(s: Tensor) -> Tensor:
    return s.diagonal(dim1=-2, dim2=-1)


def mean_exp(t: Tensor) -> Tensor:
    return t.exp().mean((-2, -1))


def js(s: Tensor) -> Tensor:
    return -(1 + (-diagonal(s)).exp()).log().mean(-1) - (1 + off(s).exp()).log().mean((-2, -1))


def dv(s: Tensor) -> Tensor:
    return diagonal(s).mean(-1) - mean_exp(off(s)).log()


def tuba(s: Tensor) -> Tensor:
    return 1 + diagonal(s).mean(-1) - mean_exp(off(s))


def interpolated(s: Tensor, alpha: float = 0.5, log_a: float = 0.0) -> Tensor:
    """Anchored at the columns."""
    n = s.shape[-1] - 1
    m = off(s.mT).exp().mean(-1)
    candidates = (diagonal(s).exp() + (n - 1) * m) / n
    a = math.exp(log_a)
    joint = (diagonal(s).exp() / (alpha * candidates + (1 - alpha) * a)).log()
    return 1 + joint.mean(-1) - (m / (alpha * m + (1 - alpha) * a)).mean(-1)


def nwj(s: Tensor) -> Tensor:
    return diagonal(s).mean(-1) - mean_exp(off(s) - 1)


def smile(s: Tensor) -> Tensor:
    return diagonal(s).mean(-1) - mean_exp(off(s).clamp(-0.4, 0.4)).log()


def wasserstein(s: Tensor) -> Tensor:
    return diagonal(s).mean(-1) - off(s).mean((-2, -1))


def interpolated_x(s: Tensor) -> Tensor:
    return interpolated(s.mT, 0.2)


# name: the bound, its value, and the objective whose gradient it has and which its critic maximises
BOUNDS: dict[str, tuple[Callable, Callable, Callable]] = {
    "nwj": (NWJ, nwj, nwj),
    "tuba": (TUBA, tuba, tuba),
    "tuba_x": (lambda c: TUBA(c, anchor="x"), tuba, tuba),
    "dv": (DonskerVaradhan, dv, dv),
    "mine": (MINE, dv, dv),
    "js": (JensenShannon, tuba, js),
    "smile": (lambda c: SMILE(c, clip=0.4), smile, js),
    "smile_inf": (lambda c: SMILE(c, clip=math.inf), dv, js),
    "interpolated": (InterpolatedBound, interpolated, interpolated),
    "interpolated_x": (lambda c: InterpolatedBound(c, alpha=0.2, anchor="x"), interpolated_x, interpolated_x),
    "wasserstein": (lambda c: WassersteinDependency(c, penalty=0.0), wasserstein, wasserstein),
}


def pair(*lead: int, batch: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = (torch.randn(*lead, batch, 4, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, y


def gradients(value: Tensor, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((value * weights.to(value)).sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("critic_name", "lead"), CASES)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_and_their_gradients_are_those_of_materialised_scores(
    name: str, critic_name: str, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    build, value, objective = BOUNDS[name]
    critic = CRITICS[critic_name]().to(dtype)
    exact_critic = copy.deepcopy(critic).double()
    x, y = (t.requires_grad_() for t in pair(*lead, dtype=dtype))
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    bound = build(critic)
    weights = torch.randn(lead, dtype=torch.float64)
    tolerance = dict(rtol=1e-9, atol=1e-11) if dtype == torch.float64 else dict(rtol=2e-5, atol=4e-6)

    exact_inputs = [exact_x, exact_y, *exact_critic.parameters()]
    wants = gradients(objective(exact_critic(exact_x, exact_y)), weights, exact_inputs)
    with torch.no_grad():
        scores = exact_critic(exact_x, exact_y)
    for got, want, sign in (
        (bound(x, y), value(scores), 1),
        (bound.learning_loss(x, y), -objective(scores), -1),
    ):
        assert got.shape == lead and got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)
        for g, w in zip(gradients(got, weights, [x, y, *critic.parameters()]), wants, strict=True):
            torch.testing.assert_close(sign * g.double(), w, **tolerance)


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


def oracle_features(x: Tensor, y: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Features whose inner product is log p(x, y) / p(x) p(y) of standard Gaussians correlated by rho."""
    spread = 2 * (1 - rho**2)
    one = torch.ones_like(x[..., :1])
    constant = -0.5 * x.shape[-1] * math.log(1 - rho**2)
    a = torch.cat([2 * rho * x, -(rho**2) * x.square(), -(rho**2) * one.expand_as(x)], -1) / spread
    return torch.cat([a, constant * one], -1), torch.cat([y, one.expand_as(y), y.square(), one], -1)


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


def test_js_trained_critics_are_valued_without_the_offset_of_nwj() -> None:
    """At the optimum of the JS objective, log r, the NWJ value is 1 / e short; the reported one is not."""
    x, y = gaussians(repeats=16, batch=512, mi=2.0)
    true = DotCritic()
    difference = JensenShannon(true)(x, y) - NWJ(true)(x, y)
    assert difference.mean().item() == pytest.approx(1 / math.e, abs=0.02)
    # log r is where the objective's gradient vanishes: scores above and below lose
    base, (a, b) = js(true(x, y)).mean(), (js(true(x, y) + c).mean() for c in (-0.3, 0.3))
    assert base > a and base > b


def loo_interpolated(s: Tensor, alpha: float) -> Tensor:
    """The published notebook's form, rows being the conditioning variable: the logarithm is averaged over which
    stranger the partner replaces."""
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


@pytest.mark.parametrize("build", [TUBA, InterpolatedBound])
@pytest.mark.parametrize("shape", ["rows", "column", "number"])
def test_a_baseline_is_subtracted_per_sample_of_its_anchor(build, shape: str) -> None:
    net = nn.Linear(4, 1).double()
    baseline = {
        "rows": lambda t: net(t).squeeze(-1),
        "column": net,
        "number": lambda t: net.bias[0],
    }[shape]
    critic, (x, y) = CRITICS["bilinear"]().double(), pair(2)
    for anchor, t in (("y", y), ("x", x)):
        scores = critic(x, y) if anchor == "y" else critic(x, y).mT
        log_a = net.bias[0].expand(2, 7) if shape == "number" else net(t).squeeze(-1)
        shifted = scores - log_a[:, None, :]
        want = tuba(shifted) if build is TUBA else interpolated(shifted)
        got = build(critic, baseline=baseline, anchor=anchor)(x, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), net.bias)[0] for v in (got, want)))


def test_a_baseline_module_is_part_of_the_bound() -> None:
    assert len(list(TUBA(DotCritic(), baseline=nn.Linear(4, 1)).parameters())) == 2
    with pytest.raises(ValueError, match="baseline must return"):
        TUBA(DotCritic(), baseline=lambda t: t)(*pair())


def mine_gradient(scores: Tensor, log_average: float) -> Tensor:
    """dS of E_P[T] - E_Q[exp T] / A."""
    b = scores.shape[-1]
    weights = (scores.detach() - log_average).exp() / (b * (b - 1))
    return torch.eye(b, dtype=scores.dtype) / b - weights.masked_fill(torch.eye(b, dtype=torch.bool), 0)


def test_mine_divides_by_a_moving_average() -> None:
    critic = CRITICS["dot"]()
    bound = MINE(critic, decay=0.9)
    average = None
    for _ in range(4):
        x, y = (t.requires_grad_() for t in pair())
        scores = critic(x, y)
        batch_mean = mean_exp(off(scores)).item()
        average = batch_mean if average is None else 0.9 * average + 0.1 * batch_mean
        value = bound(x, y)
        assert bound.log_average.item() == pytest.approx(math.log(average), abs=1e-12)
        torch.testing.assert_close(value, dv(scores))
        want = torch.autograd.grad(scores, [x, y], mine_gradient(scores, math.log(average)))
        for a, b in zip(torch.autograd.grad(value, [x, y]), want, strict=True):
            torch.testing.assert_close(a, b)


def test_mine_without_memory_and_in_evaluation_is_donsker_varadhan() -> None:
    critic, first, second = CRITICS["dot"](), pair(), [t.requires_grad_() for t in pair()]
    plain = torch.autograd.grad(DonskerVaradhan(critic)(*second), second)
    forgetful, evaluated = MINE(critic, decay=0.0), MINE(critic)
    for bound in (forgetful, evaluated):
        bound(*first)
    before = evaluated.log_average.clone()
    for bound in (forgetful, evaluated.eval()):
        for a, b in zip(torch.autograd.grad(bound(*second), second), plain, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(evaluated.log_average, before)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_the_moving_average_of_mine_survives_a_checkpoint(lead: tuple[int, ...], tmp_path) -> None:
    bound = MINE(BilinearCritic(4, 4).double())
    for _ in range(3):
        bound(*pair(*lead))
    torch.save(bound.state_dict(), tmp_path / "bound.pt")
    resumed = MINE(BilinearCritic(4, 4).double())
    resumed.load_state_dict(torch.load(tmp_path / "bound.pt"))
    assert resumed.log_average.shape == lead
    x, y = (t.requires_grad_() for t in pair(*lead))
    for a, b in zip(*(torch.autograd.grad(m(x, y).sum(), [x, y]) for m in (bound, resumed)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(bound.log_average, resumed.log_average)


def test_a_batch_that_is_not_finite_leaves_the_moving_average_as_it_was() -> None:
    bound = MINE(DotCritic())
    x, y = pair()
    assert bound(x * math.nan, y).isnan()
    assert bound.log_average.isnan()
    bound(x, y)
    before = bound.log_average.clone()
    assert bound(x * math.nan, y).isnan()
    assert torch.equal(bound.log_average, before)


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
    # from e^80 on: slope and value of the tangent
    t = torch.full((2, 1), 90.0, requires_grad=True)
    value = TUBA(DotCritic())(x, t)
    assert value.item() == pytest.approx(-11 * math.exp(80), rel=1e-5)
    (slope,) = torch.autograd.grad(value, t)
    assert slope.sum().item() == pytest.approx(-math.exp(80), rel=1e-5)


def test_a_critic_table_trained_on_noisy_bits_reaches_their_information() -> None:
    """Counts that realise P exactly; Q of a finite batch leaves the true pairs out, which the closed form knows."""
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


@pytest.mark.parametrize("name", BOUNDS)
def test_permuting_the_batch_changes_nothing(name: str) -> None:
    bound = BOUNDS[name][0](CRITICS["concat"]().double()).eval()
    (x, y), order = pair(batch=11), torch.randperm(11)
    torch.testing.assert_close(bound(x[order], y[order]), bound(x, y))
    torch.testing.assert_close(bound.learning_loss(x[order], y[order]), bound.learning_loss(x, y))


@pytest.mark.parametrize("name", [n for n in BOUNDS if not n.endswith(("_x", "_inf"))])
def test_compiles_without_graph_breaks(name: str) -> None:
    module = BOUNDS[name][0](ConcatCritic(4, 4, hidden_dims=(8, 8), memory_budget=512))
    x, y = pair(dtype=torch.float32)
    module(x, y)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))


@pytest.mark.parametrize("name", BOUNDS)
def test_bad_inputs_are_named(name: str) -> None:
    bound = BOUNDS[name][0](BilinearCritic(4, 4).double())
    x, y = pair()
    for bad_x, bad_y, message in [
        (x[:1], y[:1], "x must hold at least 2 samples"),
        (x[:0], y[:0], "x must be"),
        (x[:5], y, "y must have the batch dimensions of x"),
        (x, y[0], "y must be"),
        (x[:, :3], y, "x must be"),
    ]:
        for call in (bound, bound.learning_loss):
            with pytest.raises(ValueError, match=message):
                call(bad_x, bad_y)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MINE(DotCritic(), decay=1.0), "decay must be in"),
        (lambda: SMILE(DotCritic(), clip=0.0), "clip must be positive"),
        (lambda: InterpolatedBound(DotCritic(), alpha=1.5), "alpha must be in"),
        (lambda: InterpolatedBound(DotCritic(), anchor="z"), "anchor must be one of"),
        (lambda: TUBA(DotCritic(), anchor="z"), "anchor must be one of"),
        (lambda: WassersteinDependency(DotCritic(), penalty=-1.0), "penalty must not be negative"),
    ],
)
def test_bad_settings_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_critic_without_statistics_is_refused() -> None:
    with pytest.raises(TypeError, match="critic must have a method statistics"):
        NWJ(nn.Linear(3, 1))  # type: ignore[arg-type]


def test_other_groups_than_the_moving_average_has_are_refused() -> None:
    bound = MINE(DotCritic())
    bound(*pair(3))
    with pytest.raises(ValueError, match="group dimensions of the moving average"):
        bound(*pair(2))
