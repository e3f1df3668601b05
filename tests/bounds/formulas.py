"""The bounds, and independent formulas for them on materialised scores [*, B, B]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

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


def off(s: Tensor) -> Tensor:
    """The off-diagonal entries, [*, B, B - 1]."""
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
    """The interpolated bound with the columns as anchors."""
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


# name: (the bound, a formula for its value, a formula for the objective that its critic maximises and whose gradient
# the bound has)
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


def oracle_features(x: Tensor, y: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Features whose inner product is log p(x, y) / (p(x) p(y)) of standard Gaussians with correlation rho."""
    spread = 2 * (1 - rho**2)
    one = torch.ones_like(x[..., :1])
    constant = -0.5 * x.shape[-1] * math.log(1 - rho**2)
    a = torch.cat([2 * rho * x, -(rho**2) * x.square(), -(rho**2) * one.expand_as(x)], -1) / spread
    return torch.cat([a, constant * one], -1), torch.cat([y, one.expand_as(y), y.square(), one], -1)
