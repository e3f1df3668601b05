"""estimate_mi: problems with known answers, no use of held-out samples, warnings and printed output."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.bounds import registry
from mi_kernels.estimate import inputs

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


def test_an_interval_has_the_level_that_is_asked_for(estimate: mk.MIEstimate) -> None:
    for level, z in ((0.5, 0.6745), (0.95, 1.95996), (0.99, 2.57583)):
        low, high = estimate.interval(level)
        half = pytest.approx(z * estimate.standard_error, rel=1e-4)
        assert high - estimate.value == half and estimate.value - low == half
    assert estimate.interval() == estimate.interval(0.95)
    for wrong in (0, 1, 95, -0.5, math.nan):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            estimate.interval(wrong)


def test_gaussian_within_its_interval(estimate: mk.MIEstimate) -> None:
    low, high = estimate.interval()
    assert low < 1.0 < high and estimate.standard_error < 0.1
    assert estimate.samples == {"train": 600, "validation": 150, "held_out": 750}
    assert estimate.standard_error == pytest.approx(math.hypot(estimate.sampling_error, estimate.fit_error))
    assert estimate.value == pytest.approx((estimate.train_value + estimate.held_out_value) / 2)
    drop = max(estimate.train_value - estimate.held_out_value, 0.0)
    assert estimate.fit_error == pytest.approx(max(drop / 2 + estimate.sampling_error, 2 / 150))


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
    assert found.held_out_value < estimate.held_out_value - 0.5


@pytest.mark.parametrize("name", [name for name in registry.estimators() if name != "infonce"])
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


def test_a_sharp_support_of_two_scalars_is_found() -> None:
    task = mk.tasks.FORTY["1v1-additive-0.1"]
    found = mk.estimate_mi(*task.sample(1500, 1), max_steps=200, progress=False)
    assert abs(found.value - task.mutual_information) < 0.15 and {row["member"] for row in found.history} == {0, 1}


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
        low, _ = found.interval()
        assert any(w.startswith("no dependence was found") for w in found.warnings) == (low <= 0)
        values.append(found.value)
    assert min(values) <= 0


def test_a_fit_that_was_cut_short_says_so(gaussian: tuple[Tensor, Tensor]) -> None:
    found = mk.estimate_mi(*gaussian, critic="separable", **QUICK)
    assert not any(w.startswith("no dependence") for w in found.warnings)
    assert any(w.startswith("not converged") for w in found.warnings)


def test_constant_columns_are_left_out_and_named(gaussian: tuple[Tensor, Tensor]) -> None:
    x, y = gaussian
    found = mk.estimate_mi(torch.cat([x, torch.ones(1500, 2)], -1), y, **QUICK)
    assert "x: 2 constant columns were left out" in found.warnings


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
