"""Tasks with known mutual information, against independent formulas, quadrature and the moments of their samples."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from mi_kernels import tasks

special = pytest.importorskip("scipy.special")
integrate = pytest.importorskip("scipy.integrate")
stats = pytest.importorskip("scipy.stats")

GROUPS = {
    r"(normal_cdf-|half_cube-|wiggly-|swissroll_x-normal_cdf-)?1v1-normal-0.75|1v1-bimodal-0.75": 6,
    r"1v1-additive-0\.(1|75)": 2,
    r"multinormal-dense-(\d+)-\1-0\.5": 5,
    r"multinormal-sparse-(\d+)-\1-2-2\.0": 4,
    r"(normal_cdf|half_cube|spiral|spiral-normal_cdf)-multinormal-sparse-(\d+)-\2-2-2\.0": 12,
    r"(asinh-)?student-identity-\d-\d-\d": 11,
}
PUBLISHED = {
    "1v1-normal-0.75": 0.413339,
    "1v1-additive-0.1": 1.709438,
    "1v1-additive-0.75": 0.333333,
    "student-identity-1-1-1": 0.224171,
    "student-identity-2-2-1": 0.431946,
    "student-identity-5-5-3": 0.298544,
    "multinormal-dense-25-25-0.5": 1.292184,
    "multinormal-dense-50-50-0.5": 1.624265,
    "spiral-normal_cdf-multinormal-sparse-25-25-2-2.0": 1.021651,
    "asinh-student-identity-3-3-2": 0.290922,
    "swissroll_x-normal_cdf-1v1-normal-0.75": 0.413339,
}


def sample(name: str, n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    x, y = tasks.FORTY[name].sample(n, 7, dtype=torch.float64)
    return x.numpy(), y.numpy()


def test_there_are_forty_in_their_groups() -> None:
    assert len(tasks.FORTY) == 40
    counts = {pattern: sum(bool(re.fullmatch(pattern, name)) for name in tasks.FORTY) for pattern in GROUPS}
    assert counts == GROUPS


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    assert tasks.FORTY[name].mutual_information == pytest.approx(PUBLISHED[name], abs=1e-6)


def log_determinant_value(covariance: np.ndarray, dim: int) -> float:
    log_det = lambda c: np.linalg.slogdet(c)[1]  # noqa: E731
    return 0.5 * (log_det(covariance[:dim, :dim]) + log_det(covariance[dim:, dim:]) - log_det(covariance))


@pytest.mark.parametrize("dim", [2, 3, 5, 25, 50])
def test_dense_value_from_determinants(dim: int) -> None:
    covariance = np.full((2 * dim, 2 * dim), 0.5) + 0.5 * np.eye(2 * dim)
    task = tasks.FORTY[f"multinormal-dense-{dim}-{dim}-0.5"]
    assert task.mutual_information == pytest.approx(log_determinant_value(covariance, dim), rel=1e-10)


def test_bivariate_student_value_by_quadrature() -> None:
    # Polar quadrature of E log p(x, y) / (p(x) p(y)) for one degree of freedom.
    def integrand(angle: float, u: float) -> float:
        radius = u / (1 - u)
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        joint = (1 + radius**2) ** -1.5 / (2 * math.pi)
        ratio = joint * math.pi**2 * (1 + x * x) * (1 + y * y)
        return joint * math.log(ratio) * radius / (1 - u) ** 2

    value, _ = integrate.dblquad(integrand, 0, 1, 0, math.pi / 2, epsabs=1e-7)
    assert tasks.FORTY["student-identity-1-1-1"].mutual_information == pytest.approx(4 * value, abs=1e-4)


@pytest.mark.parametrize("epsilon", [0.1, 0.75])
def test_additive_value_by_quadrature(epsilon: float) -> None:
    # I = h(Y) - h(noise), with h(Y) from the density of the sum of two uniform variables.
    y = np.linspace(-epsilon, 1 + epsilon, 400_001)
    density = np.clip(np.minimum(y + epsilon, 1) - np.maximum(y - epsilon, 0), 0, None) / (2 * epsilon)
    entropy = -integrate.trapezoid(special.xlogy(density, density), y)
    value = entropy - math.log(2 * epsilon)
    assert tasks.FORTY[f"1v1-additive-{epsilon}"].mutual_information == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("task", tasks.FORTY.values(), ids=tasks.FORTY.keys())
def test_shapes_seeds_and_random_state(task: tasks.Task) -> None:
    before = torch.get_rng_state()
    x, y = task.sample(16, 3)
    assert (x.shape, y.shape, x.dtype) == ((16, task.x_dim), (16, task.y_dim), torch.float32)
    again = task.sample(16, torch.Generator().manual_seed(3))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x, task.sample(16, 4)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_dense_and_sparse_correlations() -> None:
    n = 40_000
    for name, expected in (("dense-5-5-0.5", np.full((5, 5), 0.5)), ("sparse-5-5-2-2.0", np.diag([0.8, 0.8, 0, 0, 0]))):
        x, y = sample(f"multinormal-{name}", n)
        correlation = np.corrcoef(x.T, y.T)
        np.testing.assert_allclose(correlation[:5, 5:], expected, atol=0.03)
        np.testing.assert_allclose(x.var(0), 1, atol=0.05)


def test_student_is_uncorrelated_dependent_and_has_student_marginals() -> None:
    x, y = sample("student-identity-3-3-3")
    assert stats.kstest(x[:, 0], stats.t(3).cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(x[:, 0], y[:, 0]).statistic) < 0.03
    assert stats.spearmanr(np.abs(x[:, 0]), np.abs(y[:, 0])).statistic > 0.1


def test_bimodal_marginals() -> None:
    x, y = sample("1v1-bimodal-0.75")
    for v, weight, low, high in ((x, 0.3, 0, 5), (y, 0.5, -1, 3)):
        cdf = lambda t, w=weight, a=low, b=high: w * special.ndtr(t - a) + (1 - w) * special.ndtr(t - b)  # noqa: E731
        assert stats.kstest(v[:, 0], cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "name",
    ["normal_cdf-1v1-normal-0.75", "1v1-bimodal-0.75", "wiggly-1v1-normal-0.75", "half_cube-1v1-normal-0.75"],
)
def test_monotone_maps_keep_the_ranks(name: str) -> None:
    base, mapped = sample("1v1-normal-0.75", 2_000), sample(name, 2_000)
    for before, after in zip(base, mapped, strict=True):
        assert (np.argsort(before[:, 0]) == np.argsort(after[:, 0])).all()


@pytest.mark.parametrize("base", ["multinormal-sparse-5-5-2-2.0", "normal_cdf-multinormal-sparse-5-5-2-2.0"])
def test_spirals_can_be_undone(base: str) -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    before, after = sample(base, 50), sample(f"spiral-{base}", 50)
    for plain, turned, (i, j) in zip(before, after, [(0, 1), (1, 2)], strict=True):
        generator = np.zeros((5, 5))
        generator[i, j], generator[j, i] = 1, -1
        back = [scipy_linalg.expm(-generator * (v @ v) / 5) @ v for v in turned]
        np.testing.assert_allclose(back, plain, atol=1e-10)
        assert np.abs(turned - plain).max() > 0.1


def test_swissroll_radius_gives_back_the_uniform() -> None:
    (u, _), (roll, _) = sample("normal_cdf-1v1-normal-0.75", 500), sample("swissroll_x-normal_cdf-1v1-normal-0.75", 500)
    t = 21 * np.linalg.norm(roll, axis=1)
    np.testing.assert_allclose((t / (1.5 * math.pi) - 1) / 2, u[:, 0], atol=1e-10)


def test_gaussian_staircase_has_the_value_that_was_asked_for() -> None:
    task, cubic = tasks.gaussian(6.0, 20), tasks.gaussian(6.0, 20, cubic=True)
    assert task.mutual_information == cubic.mutual_information == 6.0
    x, y = task.sample(50_000, 1, dtype=torch.float64)
    rho = (x * y).mean().item()
    assert -10 * math.log1p(-rho * rho) == pytest.approx(6.0, abs=0.05)
    torch.testing.assert_close(cubic.sample(9, 1)[1], task.sample(9, 1)[1] ** 3)


@pytest.mark.parametrize("value, dim", [(-0.1, 2), (math.inf, 2), (math.nan, 2), (1.0, 0)])
def test_gaussian_refuses(value: float, dim: int) -> None:
    with pytest.raises(ValueError, match=r"mutual_information|dim"):
        tasks.gaussian(value, dim)


@pytest.mark.parametrize("rho, dim, total, pair, low, high", [
    (0.3, 4, 0.4867, 0.1886, 0.6698, 0.7030),
    (0.5, 4, 1.3863, 0.5754, 1.1186, 1.1716),
    (0.7, 4, 3.0650, 1.3467, 1.6135, 1.6861),
    (0.5, 20, 6.9315, 2.8768, 2.5953, 2.6197),
])
def test_three_modalities(rho: float, dim: int, total: float, pair: float, low: float, high: float) -> None:
    known = tasks.EquicorrelatedGaussian(rho, dim)
    assert known.total_correlation == pytest.approx(total, abs=1e-4)
    assert known.pair_mutual_information == pytest.approx(pair, abs=1e-4)
    assert known.joint_mutual_information == pytest.approx(total - pair, abs=2e-4)
    assert known.wasserstein_bounds == pytest.approx((low, high), abs=1e-4)
    one = np.full((3, 3), rho) + (1 - rho) * np.eye(3)
    assert known.total_correlation == pytest.approx(-0.5 * dim * np.linalg.slogdet(one)[1])
    first = np.stack([m[:, 0].numpy() for m in known.sample(20_000, 2)])
    np.testing.assert_allclose(np.corrcoef(first), one, atol=0.03)


BAD: dict[str, list] = {
    "n": [0, -3, 1.5, True, None, "9", [9], math.nan, np.arange(3)],
    "seed": [None, 1.5, "0", True, [0], 2**63, np.arange(3)],
    "dtype": [None, "float32", torch.int64, torch.complex64, np.float32, 3],
    "mutual_information": [-0.1, math.inf, math.nan, None, "1", 1j, True, [1.0], np.ones(2)],
    "dim": [0, 1.5, None, "2", True, [2]],
    "correlation": [1.0, -0.1, math.nan, None, "0.5", 0.5j, [0.5], np.zeros(2)],
}
ENTRIES = {
    "task": (tasks.FORTY["1v1-normal-0.75"].sample, {"n": 5}, ("n", "seed", "dtype")),
    "three": (tasks.EquicorrelatedGaussian(0.5, 2).sample, {"n": 5}, ("n", "seed", "dtype")),
    "gaussian": (tasks.gaussian, {"mutual_information": 1.0}, ("mutual_information", "dim")),
    "equicorrelated": (tasks.EquicorrelatedGaussian, {"correlation": 0.5, "dim": 2}, ("correlation", "dim")),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_kind_of_bad_argument_is_named(entry: str) -> None:
    call, good, names = ENTRIES[entry]
    call(**good)
    for name in names:
        for value in BAD[name]:
            with pytest.raises(ValueError, match=f"^{name} must be "):
                call(**good | {name: value})


def test_numbers_of_numpy_are_taken() -> None:
    x, _ = tasks.gaussian(np.float64(1.0), np.int64(2)).sample(np.int32(7), np.int64(3))
    assert torch.equal(x, tasks.gaussian(1.0, 2).sample(7, 3)[0])
