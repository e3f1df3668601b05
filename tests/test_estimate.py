"""estimate_mi: values with known answers, what it may look at, its errors, and the pieces it is made of."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.critics import Critic
from mi_kernels.estimate import held_out, inputs
from mi_kernels.estimate.hybrid import CanonicalPairs, GaussianCritic, HybridCritic, MeanCritic, choose_pairs
from mi_kernels.estimate.objectives import SymmetricInfoNCE, estimators
from mi_kernels.estimate.preprocessing import Preprocessing, RankNormal

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"max_steps": 100, "progress": False}


@pytest.fixture(scope="module")
def gaussian(one_thread: None) -> tuple[Tensor, Tensor]:
    return mk.tasks.gaussian(1.0, 2).sample(1500, 5)


@pytest.fixture(scope="module")
def estimate(gaussian: tuple[Tensor, Tensor]) -> mk.MIEstimate:
    return mk.estimate_mi(*gaussian, **QUICK)


def without_time(found: mk.MIEstimate) -> str:
    return json.dumps(found.as_dict() | {"seconds": 0})


# --- the number ---------------------------------------------------------------------------------------------------


def test_gaussian_within_its_interval(estimate: mk.MIEstimate) -> None:
    low, high = estimate.interval()
    assert low < 1.0 < high and estimate.standard_error < 0.1
    assert estimate.samples == {"train": 600, "validation": 150, "held_out": 750}
    assert estimate.standard_error == pytest.approx(math.hypot(estimate.sampling_error, estimate.fit_error))
    assert estimate.fit_error == pytest.approx(abs(estimate.train_value - estimate.value))


def test_equal_seeds_give_equal_results_and_leave_the_callers_state(
    gaussian: tuple[Tensor, Tensor], estimate: mk.MIEstimate
) -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        again = mk.estimate_mi(*(t.double().numpy() for t in gaussian), **QUICK)
        assert not torch.is_grad_enabled()
    assert without_time(again) == without_time(estimate)
    assert torch.equal(before, torch.get_rng_state())
    assert mk.estimate_mi(*gaussian, seed=1, **QUICK).value != estimate.value


def test_the_default_dtype_does_not_matter(gaussian: tuple[Tensor, Tensor], estimate: mk.MIEstimate) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = mk.estimate_mi(*gaussian, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.value == pytest.approx(estimate.value, abs=0.05)


def test_units_do_not_matter(gaussian: tuple[Tensor, Tensor], estimate: mk.MIEstimate) -> None:
    x, y = gaussian
    scaled = mk.estimate_mi(1e6 * x.double() + 1e3, 1e-9 * y.double(), **QUICK)
    assert scaled.value == pytest.approx(estimate.value, abs=0.01)


def test_the_fit_never_sees_the_held_out_samples(gaussian: tuple[Tensor, Tensor], estimate: mk.MIEstimate) -> None:
    x, y = (t.clone() for t in gaussian)
    outside = inputs.split(1500, 0.5, torch.Generator().manual_seed(0)).held_out
    x[outside] = 100 * torch.randn(x[outside].shape, generator=torch.Generator().manual_seed(1))
    found = mk.estimate_mi(x, y, **QUICK)
    assert found.history[1:] == estimate.history[1:] and found.train_value == estimate.train_value
    assert found.value < estimate.value - 0.5


@pytest.mark.parametrize("name", [name for name in estimators() if name != "infonce"])
def test_every_estimator(gaussian: tuple[Tensor, Tensor], name: str) -> None:
    found = mk.estimate_mi(*gaussian, estimator=name, **QUICK)
    if name == "nce_club":
        assert found.value > 1.0 - 2 * found.standard_error
    else:
        assert abs(found.value - 1.0) < 3 * found.standard_error
    assert 0.01 < found.sampling_error < 0.5


@pytest.mark.parametrize("critic", ["separable", "concat", "bilinear"])
def test_other_critics_learn(gaussian: tuple[Tensor, Tensor], critic: str) -> None:
    found = mk.estimate_mi(*gaussian, critic=critic, learning_rate=5e-3, **QUICK)
    scores = [row["validation"] for row in found.history]
    assert max(scores) > scores[0] + 0.1 and found.value < 1.0 + 3 * found.standard_error


def test_a_critic_of_ones_own_is_copied(gaussian: tuple[Tensor, Tensor]) -> None:
    critic = mk.SeparableCritic(2, 2, (32,), 8)
    before = copy.deepcopy(critic.state_dict())
    found = mk.estimate_mi(*gaussian, critic=critic, **QUICK)
    assert found.critic == "SeparableCritic"
    assert all(torch.equal(before[name], t) for name, t in critic.state_dict().items())


def test_nonlinear_dependence_without_correlation(generator: torch.Generator) -> None:
    x = torch.randn(1500, 1, generator=generator)
    y = x.abs() + 0.3 * torch.randn(1500, 1, generator=generator)
    assert mk.estimate_mi(x, y, max_steps=300, progress=False).value > 0.6


# --- warnings -----------------------------------------------------------------------------------------------------


def test_equal_sides_are_at_the_ceiling(generator: torch.Generator) -> None:
    x = torch.randn(400, 4, generator=generator)
    found = mk.estimate_mi(x, x, **QUICK)
    assert found.value <= found.ceiling == pytest.approx(math.log(200))
    assert any(w.startswith("at the ceiling") for w in found.warnings)


def test_independent_sides_give_about_zero_and_negative_values_are_kept() -> None:
    values = []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, 300, 3, generator=draw)
        found = mk.estimate_mi(x, y, **QUICK)
        assert abs(found.value) <= 3 * found.standard_error + 1e-3
        assert any(w.startswith("negative") for w in found.warnings) == (found.value < 0)
        values.append(found.value)
    assert min(values) <= 0


def test_a_fit_that_was_cut_short_says_so(gaussian: tuple[Tensor, Tensor]) -> None:
    found = mk.estimate_mi(*gaussian, critic="separable", **QUICK)
    assert any(w.startswith("not converged") for w in found.warnings)


def test_constant_columns_are_left_out_and_named(gaussian: tuple[Tensor, Tensor]) -> None:
    x, y = gaussian
    found = mk.estimate_mi(torch.cat([x, torch.ones(1500, 2)], -1), y, **QUICK)
    assert "x: 2 constant columns were left out" in found.warnings


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bad", [
    GOOD.index_fill(0, torch.tensor([3]), math.nan),
    GOOD.index_fill(0, torch.tensor([3]), math.inf),
    torch.ones(60, 2),
    GOOD[:40],
    GOOD.to(torch.complex64),
    GOOD[:, :0],
    GOOD.view(60, 2, 1),
    GOOD.numpy().astype(object),
    GOOD.numpy().astype("complex128"),
    GOOD.numpy().astype(str),
    "text",
    None,
], ids=["nan", "inf", "constant", "short", "complex", "empty", "3d", "object", "numpy complex", "str", "text", "none"])
@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_samples_are_refused_by_name(bad: Any, side: str) -> None:
    arguments = {"x": GOOD, "y": GOOD, side: bad}
    with pytest.raises(ValueError, match=f"^{side} must"):
        mk.estimate_mi(**arguments, progress=False)


@pytest.mark.parametrize("name, value", [
    ("max_steps", 0), ("max_steps", 1.5), ("batch_size", -4), ("batch_size", 1), ("held_out", 0.0), ("held_out", 1.0),
    ("learning_rate", -1e-3), ("estimator", "best"), ("critic", "big"), ("critic", nn.Linear(2, 2)),
])
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        mk.estimate_mi(GOOD, GOOD, progress=False, **{name: value})


def test_differing_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="y must have as many samples as x, 60, got 50"):
        mk.estimate_mi(GOOD, GOOD[:50], progress=False)


# --- pieces -------------------------------------------------------------------------------------------------------


def test_ranks_become_normal_quantiles_with_ties_in_the_middle() -> None:
    rank = RankNormal(torch.tensor([[1.0], [2.0], [2.0], [5.0]]))
    expected = torch.special.ndtri(torch.tensor([0.125, 0.5, 0.75, 0.875, 0.125], dtype=torch.float64))
    found = rank(torch.tensor([[1.0], [2.0], [3.5], [9.0], [-4.0]]))[:, 0]
    torch.testing.assert_close(found, expected)


def test_features_ignore_the_units_and_follow_single_samples(generator: torch.Generator) -> None:
    fitted, other = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)
    plain = Preprocessing(fitted)(other)
    scaled = Preprocessing(fitted * 7 - 2)(other * 7 - 2)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    alone = Preprocessing(fitted)(other[:1])
    torch.testing.assert_close(alone.features, plain.features[:1])


def test_gaussian_critic_is_the_log_density_ratio(generator: torch.Generator) -> None:
    n, rho = 100_000, torch.tensor([0.8, 0.3])
    x = torch.randn(n, 2, generator=generator)
    y = torch.cat([rho * x + (1 - rho**2).sqrt() * torch.randn(n, 2, generator=generator), x[:, :1] * 0], -1)
    y[:, 2] = torch.randn(n, generator=generator)
    of_x, of_y = Preprocessing(x.double()), Preprocessing(y.double())
    pairs = CanonicalPairs.fit(of_x(x.double()), of_y(y.double()), turned=False)
    torch.testing.assert_close(pairs.correlations.float(), rho, atol=0.02, rtol=0)
    a, b = pairs.first(2).inputs(of_x(x[:7].double()), of_y(y[:5].double()))
    scores = GaussianCritic()(a[:, :3], b[:, :3])
    u, v = x[:7, None], y[None, :5, :2]
    expected = ((rho * u * v - rho**2 * (u**2 + v**2) / 2) / (1 - rho**2)).sum(-1)
    torch.testing.assert_close(scores, expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("name, count", [("multinormal-dense-25-25-0.5", 1), ("multinormal-sparse-5-5-2-2.0", 2)])
def test_canonical_pairs_are_counted_on_validation_samples(name: str, count: int) -> None:
    x, y = mk.tasks.FORTY[name].sample(3000, 1, dtype=torch.float64)
    of_x, of_y = Preprocessing(x), Preprocessing(y)
    parts = [(of_x(x[s]), of_y(y[s])) for s in (slice(0, 2000), slice(2000, 3000))]
    pairs, value = choose_pairs(*parts)
    assert pairs.correlations.numel() == count and value > 0.9


def test_no_canonical_pair_of_independent_samples(generator: torch.Generator) -> None:
    x, y = torch.randn(2, 2000, 10, generator=generator, dtype=torch.float64)
    of_x, of_y = Preprocessing(x), Preprocessing(y)
    parts = [(of_x(x[s]), of_y(y[s])) for s in (slice(0, 1500), slice(1500, 2000))]
    assert choose_pairs(*parts)[0].correlations.numel() == 0


def test_mean_critic_scores_are_the_mean(generator: torch.Generator) -> None:
    critics = [HybridCritic(2, 4, 5, gaussian=gaussian) for gaussian in (True, False)]
    for critic in critics:
        nn.init.normal_(critic.y_network.last.weight)
    x, y = torch.randn(6, 7, generator=generator), torch.randn(9, 8, generator=generator)
    expected = (critics[0](x, y) + critics[1](x, y)) / 2
    torch.testing.assert_close(MeanCritic(critics)(x, y), expected)


def test_symmetric_infonce_is_the_mean_of_both_anchors(generator: torch.Generator) -> None:
    critic: Critic = mk.SeparableCritic(3, 2, (8,), 4)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
    expected = (mk.InfoNCE(critic)(x, y) + mk.InfoNCE(critic, anchor="y")(x, y)) / 2
    torch.testing.assert_close(SymmetricInfoNCE(critic)(x, y), expected)


class _MeanOfX(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mean()


def test_jackknife_of_a_mean_is_the_error_of_a_mean(generator: torch.Generator) -> None:
    x = torch.randn(1000, 1, generator=generator)
    groups = torch.stack([x[k::10].mean() for k in range(10)])
    found = held_out.evaluate(_MeanOfX(), x, x, 5000)
    assert found.mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert found.sampling_error == pytest.approx((groups.std() / math.sqrt(10)).item(), rel=1e-3)


def test_blocks_bound_the_candidates(generator: torch.Generator) -> None:
    x = torch.randn(250, 3, generator=generator)
    found = held_out.evaluate(SymmetricInfoNCE(mk.DotCritic()), x, x, 100)
    assert found.candidates == 83 and found.mean <= math.log(83)


def test_plot_and_text(estimate: mk.MIEstimate) -> None:
    assert "95 % interval" in str(estimate)
    pytest.importorskip("matplotlib")
    axes = estimate.plot()
    assert axes.get_ylabel() == "nats" and len(axes.get_lines()) >= 3


def test_progress_without_tqdm(
    gaussian: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    mk.estimate_mi(*gaussian, max_steps=50)
    assert "step 50 of 50" in capsys.readouterr().err
