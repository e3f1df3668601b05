"""Pairs of variables with known mutual information that are not Gaussian: images, mixtures, discrete-continuous pairs.

`python -m bench.mi_tasks --tasks beyond` runs `estimate_mi` on them. The images are MNIST's: MI_KERNELS_DATA names the
folder that holds mnist.npz, or else ../shared/data beside the checkout; without it scikit-learn's 8 x 8 digits.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = 10
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Known:
    """A pair with known mutual information: draws of n rows by a generator, and the truth in nats, found when asked."""

    name: str
    draw: Callable[[int, torch.Generator], Pair]
    truth: Callable[[], float]
    most: Callable[[], int] | None = None  # rows that can be drawn, where repeating one would copy a pair

    @property
    def mutual_information(self) -> float:
        return self.truth()

    def sample(self, n: int, seed: int) -> Pair:
        """x [n, Dx] and y [n, Dy]; equal seeds give equal rows. Raises ValueError for more rows than there are."""
        if self.most is not None and n > self.most():
            raise ValueError(f"{self.name} has {self.most()} rows, n was {n}")
        return self.draw(n, torch.Generator().manual_seed(seed))


@functools.cache
def images() -> Pair:
    """Grey values [n, side, side] in [0, 1] and classes [n], in an order of their own."""
    import numpy as np

    named = os.environ.get("MI_KERNELS_DATA")
    path = (Path(named) if named else Path(__file__).parents[2] / "shared" / "data") / "mnist.npz"
    if path.exists():
        with np.load(path) as stored:
            pixels = np.concatenate([stored["x_train"], stored["x_test"]]) / 255
            labels = np.concatenate([stored["y_train"], stored["y_test"]])
    else:
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels, labels = found.images / 16, found.target
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(pixels, dtype=torch.float32)[order], torch.as_tensor(labels, dtype=torch.int64)[order]


def _pictures(index: Tensor, pool: int) -> Tensor:
    """Rows of the images, averaged over pool x pool pixels."""
    pixels = images()[0][index]
    return torch.nn.functional.avg_pool2d(pixels[:, None], pool).flatten(1)


def _of_class(classes: Tensor, generator: torch.Generator) -> Tensor:
    """An image of each given class, drawn with replacement."""
    labels = images()[1]
    found = torch.empty_like(classes)
    for c in range(CLASSES):
        rows, wanted = (labels == c).nonzero()[:, 0], classes == c
        found[wanted] = rows[torch.randint(len(rows), (int(wanted.sum()),), generator=generator)]
    return found


def _name(pool: int) -> str:
    return "digits" if pool == 1 else f"digits-pooled-{pool}"


def digits(pool: int, flip: float) -> Known:
    """Two images; the second is of the first's class, or with probability `flip` of another one, all alike likely.

    An image determines its class and classes are equally likely, so the information is that of the channel between
    classes: log 10 - H(flip) - flip log 9.
    """

    def draw(n: int, generator: torch.Generator) -> Pair:
        first = torch.randint(CLASSES, (n,), generator=generator)
        shift = torch.randint(1, CLASSES, (n,), generator=generator)
        flipped = torch.rand(n, generator=generator, dtype=torch.float64) < flip
        second = torch.where(flipped, (first + shift) % CLASSES, first)
        return _pictures(_of_class(first, generator), pool), _pictures(_of_class(second, generator), pool)

    def truth() -> float:
        entropy = -sum(p * math.log(p) for p in (flip, 1 - flip) if p > 0)
        return math.log(CLASSES) - entropy - flip * math.log(CLASSES - 1)

    return Known(_name(pool) if flip == 0 else f"{_name(pool)}-flipped-{flip:g}", draw, truth)


def digit_and_label(pool: int) -> Known:
    """An image and its class as ten indicators: the entropy of the classes as they are among the images."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        index = torch.randperm(len(images()[1]), generator=generator)[:n]
        return _pictures(index, pool), torch.nn.functional.one_hot(images()[1][index], CLASSES).float()

    def truth() -> float:
        share = images()[1].bincount().double() / len(images()[1])
        return -float((share * share.log()).sum())

    return Known(f"{_name(pool)}-and-label", draw, truth, lambda: len(images()[1]))


@dataclass(frozen=True)
class Mixture:
    """Of K equally likely Gaussians: x_d = x_means[k, d] + noise, y_d likewise, and the correlation of both noises is
    correlation[k]. Coordinates of the noise are independent of each other."""

    x_means: Tensor  # [K, Dx]
    y_means: Tensor  # [K, Dy], Dy = Dx unless all correlations are 0
    correlation: Tensor  # [K]
    label: bool = False  # x is the component itself, as K indicators

    def rows(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        k = torch.randint(len(self.x_means), (n,), generator=generator)
        x, y = (torch.randn(n, m.shape[1], generator=generator, dtype=torch.float64) for m in self.means)
        r = self.correlation[k][:, None]
        if self.correlation.any():
            y = r * x + (1 - r * r).sqrt() * y
        return x + self.x_means[k], y + self.y_means[k], k

    @property
    def means(self) -> Pair:
        return self.x_means, self.y_means

    def draw(self, n: int, generator: torch.Generator) -> Pair:
        x, y, k = self.rows(n, generator)
        return (torch.nn.functional.one_hot(k, len(self.x_means)).float() if self.label else x.float()), y.float()

    def truth(self) -> float:
        """The mean log density ratio of a million draws, in blocks; its standard error is below 0.0015."""
        generator = torch.Generator().manual_seed(12345)
        blocks = [self._ratio(*self.rows(100_000, generator)).mean() for _ in range(10)]
        return float(torch.stack(blocks).mean())

    def _ratio(self, x: Tensor, y: Tensor, k: Tensor) -> Tensor:
        a, b = x[:, None] - self.x_means, y[:, None] - self.y_means  # [n, K, D]
        of_x, of_y = -a.square().sum(-1) / 2, -b.square().sum(-1) / 2
        count = math.log(len(self.x_means))
        if self.label:
            return of_y.gather(1, k[:, None])[:, 0] - (of_y.logsumexp(1) - count)
        joint = of_x + of_y
        if self.correlation.any():
            r = self.correlation[:, None]
            slope = 1 - r * r
            joint = (-(a.square() - 2 * r * a * b + b.square()) / (2 * slope) - slope.log() / 2).sum(-1)
        return (joint.logsumexp(1) - count) - (of_x.logsumexp(1) - count) - (of_y.logsumexp(1) - count)


def mixture(name: str, mixed: Mixture) -> Known:
    return Known(name, mixed.draw, functools.cache(mixed.truth))


def _spread(components: int, dim: int, radius: float, seed: int) -> Tensor:
    """Directions of length `radius`."""
    drawn = torch.randn(components, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return radius * torch.nn.functional.normalize(drawn, dim=1)


def mixtures() -> list[Known]:
    """Crossed ones have the same mean everywhere and opposite correlations, so that x and y are uncorrelated."""
    signs = torch.tensor([0.9, -0.9], dtype=torch.float64)
    still = torch.zeros(2, 1, dtype=torch.float64)
    plain = torch.zeros(8, dtype=torch.float64)
    return [
        mixture("mixture-crossed-1v1", Mixture(still, still, signs)),
        mixture("mixture-crossed-3v3", Mixture(still.expand(2, 3), still.expand(2, 3), signs)),
        mixture("mixture-clusters-2v2", Mixture(_spread(8, 2, 4.0, 1), _spread(8, 2, 4.0, 2), plain)),
        mixture("mixture-clusters-20v20", Mixture(_spread(8, 20, 3.0, 3), _spread(8, 20, 3.0, 4), plain)),
        mixture("label-and-gaussian-8v1", Mixture(torch.zeros(8, 1), torch.arange(8.0)[:, None].double(), plain, True)),
        mixture("label-and-gaussian-8v16", Mixture(torch.zeros(8, 1), _spread(8, 16, 2.0, 5), plain, True)),
    ]


def uniform_on_integer(count: int) -> Known:
    """x one of `count` integers, y uniform on [x, x + 2]: log count - (count - 1) / count log 2 (Gao et al. 2017)."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        x = torch.randint(count, (n, 1), generator=generator).float()
        return x, x + 2 * torch.rand(n, 1, generator=generator)

    return Known(f"uniform-on-integer-{count}", draw, lambda: math.log(count) - (1 - 1 / count) * math.log(2))


def zero_inflated_poisson(zeros: float) -> Known:
    """x exponential, y Poisson of mean x, or 0 with probability `zeros` whatever x is; the truth by quadrature."""

    def draw(n: int, generator: torch.Generator) -> Pair:
        x = torch.empty(n, 1).exponential_(generator=generator)
        y = torch.poisson(x, generator=generator)
        return x, torch.where(torch.rand(n, 1, generator=generator) < zeros, torch.zeros(()), y)

    @functools.cache
    def truth() -> float:
        step = 2e-3
        x = (torch.arange(25_000, dtype=torch.float64) + 0.5)[:, None] * step
        y = torch.arange(150, dtype=torch.float64)
        given = (1 - zeros) * (y * x.log() - x - torch.lgamma(y + 1)).exp() + zeros * (y == 0)
        weight = step * (-x).exp()
        y_marginal = (weight * given).sum(0)
        return float((weight * torch.special.xlogy(given, given / y_marginal.clamp(min=1e-300))).sum())

    return Known(f"zero-inflated-poisson-{zeros:g}", draw, truth)


def tasks() -> dict[str, Known]:
    found = [
        *(digits(pool, 0.0) for pool in (4, 2, 1)),
        *(digits(1, flip) for flip in (0.3, 0.6, 0.9)),
        digit_and_label(1),
        *mixtures(),
        uniform_on_integer(5),
        uniform_on_integer(20),
        zero_inflated_poisson(0.15),
    ]
    return {task.name: task for task in found}
