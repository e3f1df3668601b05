"""estimate_mi: values with known answers, what it may look at, its errors, and the pieces it is made of."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.bounds import registry
from mi_kernels.bounds.info_nce import SymmetricInfoNCE
from mi_kernels.critics import Critic
from mi_kernels.estimate import held_out, inputs, screening
from mi_kernels.estimate.hybrid import (
    CanonicalPairs,
    GaussianCritic,
    HybridCritic,
    MeanCritic,
    ScalarCritic,
    choose_pairs,
)
from mi_kernels.estimate.preprocessing import Coordinates, Preprocessing, RankNormal

np = pytest.importorskip("numpy")
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


def independent(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, y


def warned(found: mk.MIEstimate, kind: str) -> list[str]:
    return [w for w in found.warnings if w.startswith(kind)]


def test_copied_rows_are_left_out_and_named() -> None:
    x, y = independent(500)
    found = mk.estimate_mi(x.repeat(20, 1), y.repeat(20, 1), max_steps=300, progress=False)
    assert sum(found.samples.values()) == 500 and abs(found.value) <= 3 * found.standard_error + 1e-3
    assert "9500 of 10000 rows" in warned(found, "copies")[0] and "20 times" in warned(found, "copies")[0]


def test_copies_of_discrete_labels_beside_a_continuous_side() -> None:
    x, y = independent(200)
    label = (x[:, 0] > 0).double()
    kept, notes = screening.without_copies(label[:, None].repeat(3, 1), y.repeat(3, 1))
    assert kept.tolist() == list(range(200)) and len(notes) == 1


@pytest.mark.parametrize("kind", ["integers", "halves", "label of integers", "sensor at its limit", "one-sided"])
def test_repeated_values_of_other_kinds_are_no_copies(kind: str) -> None:
    x, y = independent(2000)
    if kind == "integers":
        x = y = x[:, :1].mul(100).round()
    elif kind == "halves":
        x, y = x.round() / 2, (x + y).round() / 2
    elif kind == "label of integers":
        y = y[:, :1].mul(200).round()
        x = y.abs() % 7
    elif kind == "sensor at its limit":
        x, y = x.clone(), y.clone()
        x[:700], y[:700] = 1.5, -1.5
    else:
        x = x[:400].repeat(5, 1)
    assert screening.without_copies(x, y).notes == []


def test_equal_rows_have_equal_hashes_and_others_do_not() -> None:
    v = torch.cartesian_prod(*[torch.arange(-12.0, 12.0, dtype=torch.float64)] * 3)
    hashes = screening._hash(torch.cat([v, v.flip(0)]))
    assert torch.equal(hashes[: len(v)], hashes[len(v) :].flip(0)) and hashes.unique().numel() == len(v)
    assert torch.equal(screening._hash(-0.0 * v[:1]), screening._hash(0.0 * v[:1]))


@pytest.mark.parametrize("size", [1e4, 1e12, 1e300])
def test_an_outlier_is_named_and_does_no_harm(size: float) -> None:
    x, y = independent(1000)
    x[7, 1], y[7, 0] = size, -size
    found = mk.estimate_mi(x, y, **QUICK)
    assert abs(found.value) <= 2 * found.standard_error and found.standard_error < 0.1
    messages = warned(found, "outliers")
    assert [m.split(" lies")[0] for m in messages] == ["outliers: row 7 of x", "outliers: row 7 of y"]
    assert "column 1" in messages[0] and "column 0" in messages[1]


def test_heavy_tails_have_no_outliers() -> None:
    x, _ = mk.tasks.FORTY["student-identity-1-1-1"].sample(10_000, 1, dtype=torch.float64)
    assert screening.outliers("x", Preprocessing(x[:5000]), x, torch.arange(10_000)) == []
    placeholder = x.index_fill(0, torch.arange(30), -1e9)
    message = screening.outliers("x", Preprocessing(placeholder), placeholder, torch.arange(10_000))[0]
    assert message.startswith("outliers: rows ") and ", ... of x lie " in message


def series(n: int, slope: float, seed: int) -> Tensor:
    steps = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for k in range(1, n):
        steps[k] += slope * steps[k - 1]
    return steps[:, None]


def test_series_are_warned_of_where_both_sides_are_slow() -> None:
    slow, other, fast = series(1000, 0.9, 0), series(1000, 0.8, 1), series(1000, 0.0, 2)
    message = screening.follows(slow, other)[0]
    assert message.startswith("serial: ") and "time series" in message
    assert screening.follows(slow, fast) == screening.follows(fast, other) == []
    # ties take their middle rank: their order is no sign of anything
    assert screening.follows((fast > 1).double(), (series(1000, 0.0, 3) > 1).double()) == []


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
NUMPY = GOOD.double().numpy()
BAD_SAMPLES: dict[str, Any] = {
    "nan": GOOD.index_fill(0, torch.tensor([3]), math.nan),
    "inf": GOOD.index_fill(0, torch.tensor([3]), math.inf),
    "constant": torch.ones(60, 2),
    "short": GOOD[:40],
    "complex": GOOD.to(torch.complex64),
    "empty": GOOD[:, :0],
    "3d": GOOD.view(60, 2, 1),
    "0d": torch.tensor(1.0),
    "sparse": GOOD.to_sparse(),
    "meta": GOOD.to("meta"),
    "object": NUMPY.astype(object),
    "numpy complex": NUMPY.astype("complex128"),
    "str": NUMPY.astype(str),
    "dates": NUMPY.astype("datetime64[s]"),
    "masked": np.ma.masked_where(NUMPY > 1, NUMPY),
    "ragged": [[1.0, 2.0]] * 59 + [[1.0]],
    "complex list": [[1j]] * 60,
    "strings": ["a"] * 60,
    "nones": [None] * 60,
    "text": "text",
    "bytes": b"bytes",
    "number": 3.0,
    "dict": {"x": GOOD},
    "set": {1.0, 2.0},
    "iterator": iter(range(60)),
    "type": Tensor,
    "none": None,
}
GOOD_SAMPLES: dict[str, Any] = {
    "lists": GOOD.tolist(),
    "tuple": tuple(GOOD[:, 0].tolist()),
    "large integers": [[10**30 + k, -k] for k in range(60)],
    "bool": GOOD > 0,
    "bfloat16": GOOD.bfloat16(),
    "float16": GOOD.half(),
    "float8": GOOD.to(torch.float8_e4m3fn),
    "int8": (GOOD * 20).to(torch.int8),
    "uint16": (GOOD.abs() * 100).to(torch.uint16),
    "numpy float32": NUMPY.astype("float32"),
    "numpy uint8": (abs(NUMPY) * 20).astype("uint8"),
    "numpy reversed": NUMPY[::-1, ::-1],
    "numpy fortran": np.asfortranarray(NUMPY),
    "numpy big endian": NUMPY.astype(">f8"),
    "numpy read-only": np.broadcast_to(NUMPY[:, :1], (60, 3)),
    "unmasked": np.ma.masked_array(NUMPY),
    "strided": GOOD.repeat(1, 3)[:, ::2],
    "expanded": GOOD[:, :1].expand(60, 3),
    "graph": GOOD.clone().requires_grad_(),
    "huge": GOOD.double() * 1e306,
    "tiny": GOOD.double() * 1e-310,
    "one differs": torch.zeros(60, 1).index_fill(0, torch.tensor([4]), 1.0),
}
BAD_SETTINGS: dict[str, list[Any]] = {
    "max_steps": [0, -1, 1.5, True, "9", None, [9], GOOD, math.nan],
    "batch_size": [1, -4, 2.0, False, "9", None, (9,), NUMPY],
    "seed": [-1, 1.5, "0", None, True, 2**64, GOOD, math.inf],
    "held_out": [0.0, 1.0, -1, math.nan, "0.5", None, [0.5], NUMPY, 1j, True],
    "learning_rate": [-1e-3, 0, math.inf, math.nan, "1e-3", [1e-3], GOOD, 1j, True],
    "estimator": ["best", None, 3, ["nwj"], mk.NWJ, "wasserstein", NUMPY],
    "critic": ["big", None, nn.Linear(2, 2), mk.SeparableCritic, NUMPY, GOOD, ["hybrid"]],
    "device": ["nowhere", "cpu:x", "meta", 3.5, GOOD, []],
    "progress": [None, "yes", 2, NUMPY],
}
ARGUMENTS = ("x", "y", *BAD_SETTINGS)


def outcome(**changed: Any) -> mk.MIEstimate | str:
    """An estimate, or the message of an error that must be one sentence about one of the arguments."""
    try:
        return mk.estimate_mi(**({"x": GOOD, "y": GOOD.flip(0), "max_steps": 1, "progress": False} | changed))
    except (TypeError, ValueError) as error:
        message = str(error)
    assert message.split(" must ")[0] in ARGUMENTS and ". " not in message, message
    return message


@pytest.mark.parametrize("kind", BAD_SAMPLES)
@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_samples_are_refused_by_name(kind: str, side: str) -> None:
    message = outcome(**{side: BAD_SAMPLES[kind]})
    assert isinstance(message, str) and message.startswith(f"{side} must")


@pytest.mark.parametrize("kind", GOOD_SAMPLES)
def test_every_kind_of_real_numbers_is_taken(kind: str) -> None:
    found = outcome(x=GOOD_SAMPLES[kind])
    assert isinstance(found, mk.MIEstimate) and math.isfinite(found.value) and math.isfinite(found.standard_error)


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(name: str) -> None:
    for value in BAD_SETTINGS[name]:
        message = outcome(**{name: value})
        assert isinstance(message, str) and message.startswith(f"{name} must"), (value, message)


def test_mixtures_of_arguments_give_an_estimate_or_one_sentence() -> None:
    draw = random.Random(0)
    samples = [*BAD_SAMPLES.values(), *GOOD_SAMPLES.values()]
    settings: dict[str, list[Any]] = {
        "max_steps": [1, 2, np.int64(2)], "batch_size": [2, 7, 1000], "seed": [0, 2**63 - 1, np.int32(3)],
        "held_out": [0.1, 0.9, np.float32(0.5)], "learning_rate": [None, 1e-9, 10, 1], "device": [None, "cpu"],
        "estimator": list(registry.estimators()), "critic": ["hybrid", "concat", "separable", "bilinear"],
    }
    for _ in range(120):
        chosen: dict[str, Any] = {side: draw.choice(samples) for side in "xy" if draw.random() < 0.4}
        for name, values in settings.items():
            chosen[name] = draw.choice(BAD_SETTINGS[name] if draw.random() < 0.03 else values)
        outcome(**chosen)


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


def test_networks_on_top_see_variates_of_both_kinds_and_radii_alone() -> None:
    x, y = mk.tasks.FORTY["spiral-multinormal-sparse-5-5-2-2.0"].sample(2000, 1, dtype=torch.float64)
    of_x, of_y = Preprocessing(x)(x), Preprocessing(y)(y)
    train, validation = (
        tuple(Coordinates(*(t[part] for t in side)) for side in (of_x, of_y)) for part in (slice(1500), slice(1500, 2000))
    )
    pairs, _ = choose_pairs(train, validation)
    assert pairs.other is not None and pairs.other.turned != pairs.turned
    seen = pairs.correlations.numel() + pairs.other.correlations.numel() + 2
    assert pairs.widths(of_x, of_y) == [(seen, of_x.features.shape[1]), (seen, of_y.features.shape[1])]
    left, _ = pairs.inputs(of_x, of_y)
    first = pairs.correlations.numel() + 1
    variates = torch.cat([pairs.variates(of_x, of_y)[0], pairs.other.variates(of_x, of_y)[0]], -1).float()
    assert torch.equal(left[:, first : first + seen], torch.cat([variates, of_x.radii], -1))
    critic = HybridCritic(first - 1, *pairs.widths(of_x, of_y))
    assert torch.equal(critic._seen(left, critic.x_widths), left[:, first : first + seen])


def test_scalar_critic_sees_the_last_columns_side_by_side(generator: torch.Generator) -> None:
    critic = ScalarCritic(3, 2)
    x, y = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    scores = critic(x, y)
    torch.testing.assert_close(scores, critic.network(x[:, 2:], y[:, 3:]))
    found = critic.statistics(x, y, stats=("positive", "col_lse"))
    torch.testing.assert_close(found.positive, scores.diagonal())
    torch.testing.assert_close(found.col_lse, scores.logsumexp(0))


def test_a_sharp_support_of_two_scalars_is_found() -> None:
    task = mk.tasks.FORTY["1v1-additive-0.1"]
    found = mk.estimate_mi(*task.sample(1500, 1), max_steps=200, progress=False)
    assert abs(found.value - task.mutual_information) < 0.15 and {row["member"] for row in found.history} == {0, 1}


def test_mean_critic_scores_are_the_mean(generator: torch.Generator) -> None:
    critics = [HybridCritic(2, (3, 4), (3, 5), gaussian=gaussian) for gaussian in (True, False)]
    for critic in critics:
        nn.init.normal_(critic.y_network.last.weight)
    x, y = torch.randn(6, 10, generator=generator), torch.randn(9, 11, generator=generator)
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
