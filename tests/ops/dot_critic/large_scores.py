"""Losses of features whose scores have a large common part, for the tests of every backend.

The scores are exact in fp32, so that a gradient's error comes from the log-sum-exps alone. Near 900 an fp32 log-sum-exp
is off by 3e-5, an error that remains where probabilities cancel against the positive pair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.dot_critic import api


def features() -> tuple[Tensor, Tensor]:
    """fp32 rows [24, 6]; each score is 900 plus a multiple of 1/16."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-8, 9, (24, 6), generator=generator) / 4.0 for _ in range(2))
    x[:, 0], y[:, 0] = 900 / 16, 16.0
    return x, y


def _statistics(x: Tensor, y: Tensor) -> Tensor:
    found = api.statistics(x, y, stats=("row_lse", "col_lse", "positive"))
    assert found.row_lse is not None and found.col_lse is not None and found.positive is not None
    return (found.row_lse / 3 + 2 * found.col_lse / 3 - found.positive).mean()


def _info_nce(x: Tensor, y: Tensor, **options: object) -> Tensor:
    return mk.info_nce(x, y, temperature=1.0, normalize=False, **options)  # type: ignore[arg-type]


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "statistics": _statistics,
    "InfoNCE": lambda x, y: mk.InfoNCE(mk.DotCritic(1.0))(x, y),
    "one-sided": _info_nce,
    "symmetric": lambda x, y: _info_nce(x, y, symmetric=True),
    "by row": lambda x, y: _info_nce(x, y, reduction="none").mean(),
    "extra negatives": lambda x, y: _info_nce(x, y, negative_keys=y[3:9] + 0.25, in_batch=True),
}


def error(name: str, backend: str) -> float:
    """The larger of the gradients' errors, relative to fp64."""
    x, y = (t.requires_grad_() for t in features())
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    with mk.use_backend(backend):
        found = torch.autograd.grad(CALLS[name](x, y), (x, y))
    with mk.use_backend("reference"):
        want = torch.autograd.grad(CALLS[name](*wide), wide)
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(found, want, strict=True))
