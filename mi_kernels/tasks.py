"""Distributions with known mutual information, for benchmarks of estimators.

`FORTY` maps the task names of the benchmark of Czyż et al. ("Beyond Normal: On the Evaluation of Mutual Information
Estimators", NeurIPS 2023) to tasks with the same distributions and true values. Samples come from torch's generators,
so they differ from those of the original package. `gaussian` gives the tasks of Poole et al. (2019, section 4), and
`EquicorrelatedGaussian` has three modalities. All true values are in closed form, in nats.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .ops.common.checks import check_bool

Pair = tuple[Tensor, Tensor]
Draw = Callable[[int, torch.Generator], Pair]
Map = Callable[[Tensor], Tensor]


def _generator(seed: int | torch.Generator) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        if seed.device.type != "cpu":
            raise ValueError(f"seed must be an integer or a generator of the CPU, got one of {seed.device}")
        return seed
    if not _is_integer(seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits or a torch.Generator, got {seed!r}")
    return torch.Generator().manual_seed(int(seed))


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_count(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_range(name: str, value: Any, low: float, below: float, text: str) -> None:
    """Raises ValueError unless value is a real number with low <= value < below."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not low <= float(value) < below:
        raise ValueError(f"{name} must be {text}, got {value!r}")


def _check_draw(n: Any, dtype: Any) -> None:
    _check_count("n", n)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")


@dataclass(frozen=True)
class Task:
    """A joint distribution of x [n, x_dim] and y [n, y_dim] whose `mutual_information` is known, in nats."""

    name: str
    x_dim: int
    y_dim: int
    mutual_information: float
    _draw: Draw = field(repr=False)

    def sample(
        self, n: int, seed: int | torch.Generator = 0, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Draws x [n, x_dim] and y [n, y_dim] in float64 on the CPU and converts them. Equal seeds give equal samples.

        The global random state is not changed. Raises ValueError for n < 1, invalid seeds and dtypes that are not
        floats.
        """
        _check_draw(n, dtype)
        x, y = self._draw(n, _generator(seed))
        return x.to(dtype), y.to(dtype)


def _normal(n: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def _paired(rho: float, pairs: int, x_dim: int, y_dim: int) -> Draw:
    """Standard normals. The first `pairs` coordinates of x and y have correlation rho; all others are independent."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        x, y = _normal(n, x_dim, generator), _normal(n, y_dim, generator)
        y[:, :pairs] = rho * x[:, :pairs] + math.sqrt(1 - rho * rho) * y[:, :pairs]
        return x, y

    return draw


def _paired_value(rho: float, pairs: int) -> float:
    return -0.5 * pairs * math.log1p(-rho * rho)


def gaussian(mutual_information: float, dim: int = 20, *, cubic: bool = False) -> Task:
    """Independent pairs (x_k, y_k), k < dim, of standard normals with correlation sqrt(1 - exp(-2 I / dim)) (Poole et
    al. 2019, section 4).

    mutual_information: I in nats.
    dim: number of coordinates of x and of y.
    cubic: cube every coordinate of y, which does not change the mutual information.

    Raises ValueError for a negative or infinite `mutual_information` and for dim < 1.
    """
    _check_range("mutual_information", mutual_information, 0, math.inf, "a number of nats, finite and not negative")
    _check_count("dim", dim)
    check_bool(cubic=cubic)
    base = _paired(math.sqrt(-math.expm1(-2 * mutual_information / dim)), dim, dim, dim)
    name = f"gaussian{'-cubic' if cubic else ''}-{dim}-{mutual_information:g}"
    task = Task(name, dim, dim, float(mutual_information), base)
    return _mapped(task, name, lambda x: x, lambda y: y**3) if cubic else task


def _mapped(base: Task, name: str, of_x: Map, of_y: Map, x_dim: int | None = None) -> Task:
    """Applies an injective map to x and to y of the base task, which does not change the mutual information."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        x, y = base._draw(n, generator)
        return of_x(x), of_y(y)

    return Task(name, x_dim or base.x_dim, base.y_dim, base.mutual_information, draw)


def _dense(dim: int, rho: float = 0.5) -> Task:
    """Standard normals in which any two of the 2 dim coordinates of (x, y) have correlation rho."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        common = math.sqrt(rho) * _normal(n, 1, generator)
        joint = common + math.sqrt(1 - rho) * _normal(n, 2 * dim, generator)
        return joint[:, :dim], joint[:, dim:]

    value = 0.5 * math.log((1 + (dim - 1) * rho) ** 2 / ((1 - rho) * (1 + (2 * dim - 1) * rho)))
    return Task(f"multinormal-dense-{dim}-{dim}-{rho}", dim, dim, value, draw)


def _sparse(dim: int) -> Task:
    """Two coordinate pairs that share a latent variable of strength 2 with unit noise, so their correlation is 4 /
    5."""
    return Task(f"multinormal-sparse-{dim}-{dim}-2-2.0", dim, dim, _paired_value(0.8, 2), _paired(0.8, 2, dim, dim))


def _student_entropy(width: int, df: int) -> float:
    """Differential entropy of the multivariate Student distribution with identity dispersion, in nats."""
    a, b = torch.tensor((df + width) / 2, dtype=torch.float64), torch.tensor(df / 2, dtype=torch.float64)
    gain = (a * (torch.digamma(a) - torch.digamma(b))).item()
    return math.lgamma(df / 2) - math.lgamma((df + width) / 2) + width / 2 * math.log(df * math.pi) + gain


def _student(dim: int, df: int) -> Task:
    """x and y are uncorrelated, but depend on each other through the common scale sqrt(df / chi2)."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        chi2 = _normal(n, df, generator).square().sum(-1, keepdim=True)
        joint = _normal(n, 2 * dim, generator) * (df / chi2).sqrt()
        return joint[:, :dim], joint[:, dim:]

    value = 2 * _student_entropy(dim, df) - _student_entropy(2 * dim, df)
    return Task(f"student-identity-{dim}-{dim}-{df}", dim, dim, value, draw)


def _additive(epsilon: float) -> Task:
    """x uniform on [0, 1], y = x + uniform noise on [-epsilon, epsilon]."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        x, noise = torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
        return x, x + epsilon * (2 * noise - 1)

    value = epsilon - math.log(2 * epsilon) if epsilon <= 0.5 else 1 / (4 * epsilon)
    return Task(f"1v1-additive-{epsilon}", 1, 1, value, draw)


def _spiral(pair: tuple[int, int]) -> Map:
    """Rotates two coordinates by the angle |v|^2 / width. The map is injective, because it preserves |v|."""

    def rotate(v: Tensor) -> Tensor:
        angle = v.square().sum(-1) / v.shape[-1]
        a, b = v[:, pair[0]], v[:, pair[1]]
        turned = v.clone()
        turned[:, pair[0]] = angle.cos() * a + angle.sin() * b
        turned[:, pair[1]] = angle.cos() * b - angle.sin() * a
        return turned

    return rotate


def _mixture_quantile(weight: float, low: float, high: float) -> Map:
    """A monotone map from a standard normal to the mixture weight N(low, 1) + (1 - weight) N(high, 1)."""

    def quantile(z: Tensor) -> Tensor:
        target = torch.special.ndtr(z)
        left, right = torch.full_like(z, -10.0), torch.full_like(z, 10.0)
        for _ in range(60):
            middle = (left + right) / 2
            reached = weight * torch.special.ndtr(middle - low) + (1 - weight) * torch.special.ndtr(middle - high)
            below = reached < target
            left, right = torch.where(below, middle, left), torch.where(below, right, middle)
        return (left + right) / 2

    return quantile


def _swissroll(u: Tensor) -> Tensor:
    t = 1.5 * math.pi * (1 + 2 * u)
    return torch.cat([t * t.cos(), t * t.sin()], -1) / 21


def _wiggle_x(x: Tensor) -> Tensor:
    return x + 0.4 * x.sin() + 0.2 * (1.7 * x + 1).sin() + 0.03 * (3.3 * x - 2.5).sin()


def _wiggle_y(y: Tensor) -> Tensor:
    return y - 0.4 * (0.4 * y).sin() + 0.17 * (1.3 * y + 3.5).sin() + 0.02 * (4.3 * y - 2.5).sin()


def _half_cube(base: Task) -> Task:
    def stretch(v: Tensor) -> Tensor:
        return v * v.abs().sqrt()

    return _mapped(base, f"half_cube-{base.name}", stretch, stretch)


def _normal_cdf(base: Task) -> Task:
    return _mapped(base, f"normal_cdf-{base.name}", torch.special.ndtr, torch.special.ndtr)


def _asinh(base: Task) -> Task:
    return _mapped(base, f"asinh-{base.name}", torch.asinh, torch.asinh)


def _spiralled(base: Task) -> Task:
    return _mapped(base, f"spiral-{base.name}", _spiral((0, 1)), _spiral((1, 2)))


def _forty() -> list[Task]:
    rho = 0.75
    normal = Task(f"1v1-normal-{rho}", 1, 1, _paired_value(rho, 1), _paired(rho, 1, 1, 1))
    uniform, cauchy = _normal_cdf(normal), _student(1, 1)
    bimodal = _mapped(
        normal, f"1v1-bimodal-{rho}", _mixture_quantile(0.3, 0.0, 5.0), _mixture_quantile(0.5, -1.0, 3.0)
    )
    wiggly = _mapped(normal, f"wiggly-{normal.name}", _wiggle_x, _wiggle_y)
    roll = _mapped(uniform, f"swissroll_x-{uniform.name}", _swissroll, lambda y: y, x_dim=2)
    tasks = [normal, uniform, _additive(0.1), _additive(0.75), bimodal, wiggly, _half_cube(normal)]
    tasks += [cauchy, _asinh(cauchy), roll]
    tasks += [_dense(dim) for dim in (2, 3, 5, 25, 50)] + [_sparse(dim) for dim in (2, 3, 5, 25)]
    tasks += [_student(dim, df) for dim, df in ((2, 1), (2, 2), (3, 2), (3, 3), (5, 2), (5, 3))]
    for dim in (3, 5, 25):
        base = _sparse(dim)
        tasks += [_normal_cdf(base), _half_cube(base), _spiralled(base), _spiralled(_normal_cdf(base))]
    return tasks + [_asinh(_student(dim, df)) for dim, df in ((2, 1), (3, 2), (5, 2))]


FORTY: Mapping[str, Task] = MappingProxyType({task.name: task for task in _forty()})


@dataclass(frozen=True)
class EquicorrelatedGaussian:
    """Three modalities a, v, l of `dim` standard normals. Coordinate k of any two modalities has correlation
    `correlation`.

    A test case for dependency measures of more than two variables: its information quantities are known in nats, and
    its Wasserstein distance from the product of the marginals is known within a few percent. Raises ValueError for dim
    < 1 or a correlation outside [0, 1).
    """

    correlation: float
    dim: int

    def __post_init__(self) -> None:
        _check_range("correlation", self.correlation, 0, 1, "a number in [0, 1)")
        _check_count("dim", self.dim)

    @property
    def total_correlation(self) -> float:
        """KL(p(a, v, l) || p(a) p(v) p(l)) in nats."""
        rho = self.correlation
        return -0.5 * self.dim * math.log((1 - rho) ** 2 * (1 + 2 * rho))

    @property
    def pair_mutual_information(self) -> float:
        """I(a; v) in nats, the same for every pair of modalities."""
        return _paired_value(self.correlation, self.dim)

    @property
    def joint_mutual_information(self) -> float:
        """I((a, v); l) in nats."""
        return self.total_correlation - self.pair_mutual_information

    @property
    def wasserstein_bounds(self) -> tuple[float, float]:
        """A lower and an upper bound of W_1 (Euclidean cost) between p(a, v, l) and p(a) p(v) p(l). Both come from
        scaling along the eigenvectors of the covariance: the lower bound uses the mean norm, the upper bound is W_2."""
        common = math.sqrt(1 + 2 * self.correlation) - 1
        contrast = 1 - math.sqrt(1 - self.correlation)
        low = math.hypot(common * _mean_chi(self.dim), contrast * _mean_chi(2 * self.dim))
        return low, math.sqrt(self.dim * (common**2 + 2 * contrast**2))

    def sample(
        self, n: int, seed: int | torch.Generator = 0, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws a, v, l, each [n, dim]. Equal seeds give equal samples. Raises ValueError like `Task.sample`."""
        _check_draw(n, dtype)
        noise = torch.randn(4, n, self.dim, generator=_generator(seed), dtype=torch.float64)
        modalities = math.sqrt(self.correlation) * noise[0] + math.sqrt(1 - self.correlation) * noise[1:]
        a, v, language = modalities.to(dtype)
        return a, v, language


def _mean_chi(degrees: int) -> float:
    return math.sqrt(2) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
