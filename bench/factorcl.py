"""Times a training step of FactorCL-SSL on synthetic data: ours and the public formulation in eager torch, with the
same weights.

`python -m bench.factorcl [--batch 256] [--repetitions 3]` prints a table and writes bench/results/cpu_factorcl.json.
A step is the outer step and one inner step of the CLUB critics, each with its backward and Adam. The public
formulation concatenates every pair, scores the positive pairs apart, and in the inner step runs encoders and heads
with autograd. Loss and gradients of both are compared before anything is timed. Needs a quiet machine; under three
minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.batch import Batch, Inputs
from models.factorcl import MAXIMISED, MINIMISED, FactorCLConfig, FactorCLSSL
from models.layers.encoders import MLPEncoder
from models.training.phases import frozen

from . import machine, table

PUBLIC = "public formulation, eager"


def model(critic: str = "concat", seed: int = 0) -> FactorCLSSL:
    """The sizes of the public synthetic model: 4,411,398 parameters with concat critics of 512-512."""
    torch.manual_seed(seed)
    return FactorCLSSL(MLPEncoder(100), MLPEncoder(100), FactorCLConfig(critic=critic, critic_dim=128))


def synthetic_batch(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: {name: Inputs(torch.randn(rows, 100, generator=generator)) for name in ("x1", "x2")}  # noqa: E731
    return Batch(draw(), None, None, torch.arange(rows), (draw(),))


def public_scores(critic: mk.ConcatCritic, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the positive pairs [B, 1] and T[i, j] = f(x_j, y_i), every pair concatenated."""

    def network(h: Tensor) -> Tensor:
        for k, layer in enumerate(critic.layers):
            h = layer(h.relu() if k else h)
        return h

    rows = len(x)
    pairs = torch.cat([x.unsqueeze(0).repeat(rows, 1, 1), y.unsqueeze(1).repeat(1, rows, 1)], -1)
    return network(torch.cat([x, y], -1)), network(pairs).squeeze(-1)


def public_term(critic: mk.ConcatCritic, x: Tensor, y: Tensor, club: bool) -> Tensor:
    positive, scores = public_scores(critic, x, y)
    if club:
        return positive.mean() - scores.mean()
    return positive.mean() - (scores.logsumexp(1).mean() - math.log(len(x)))


def public_loss(found: FactorCLSSL, batch: Batch) -> Tensor:
    pairs = found._pairs((*MAXIMISED, *MINIMISED), batch)
    terms = {name: public_term(_critic(found, name), *pair, name in MINIMISED) for name, pair in pairs.items()}
    return torch.stack([-t if name in MAXIMISED else t for name, t in terms.items()]).sum()


def public_inner_loss(found: FactorCLSSL, batch: Batch) -> Tensor:
    pairs = found._pairs(MINIMISED, batch)
    return -torch.stack([public_term(_critic(found, name), *pair, False) for name, pair in pairs.items()]).sum()


def _critic(found: FactorCLSSL, name: str) -> mk.ConcatCritic:
    critic: Any = found.bounds[name].critic
    return critic


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4)


def public_step(found: FactorCLSSL, batch: Batch) -> Callable[[], None]:
    optimizers = [_adam(phase.parameters) for phase in found.phases()]

    def step() -> None:
        for optimizer, loss in zip(optimizers, (public_loss, public_inner_loss), strict=True):
            found.zero_grad()
            loss(found, batch).backward()
            optimizer.step()

    return step


def our_step(found: FactorCLSSL, batch: Batch) -> Callable[[], None]:
    phases = [(phase, _adam(phase.parameters)) for phase in found.phases()]

    def step() -> None:
        for phase, optimizer in phases:
            mine = {id(parameter) for parameter in phase.parameters}
            with frozen(p for p in found.parameters() if id(p) not in mine):
                optimizer.zero_grad()
                phase.loss(batch if phase.fixed is None else phase.fixed(batch)).total.backward()
                optimizer.step()

    return step


def check(rows: int = 48) -> None:
    """Raises RuntimeError unless loss and gradients of both formulations agree in double precision."""
    found, batch = model().double(), synthetic_batch(rows).to(torch.float64)
    for ours, public in ((found.loss(batch).total, public_loss(found, batch)),) + (
        (found.inner_loss(found.inner_pairs(batch)).total, public_inner_loss(found, batch)),
    ):
        phi = list(found.bounds["club_x1x2"].parameters())
        a, b = torch.autograd.grad(ours, phi), torch.autograd.grad(public, phi)
        gap = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
        if abs((ours - public).item()) > 1e-9 or gap > 1e-9:
            raise RuntimeError(f"the formulations differ by {abs((ours - public).item()):.1e} and {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    check()
    batch = synthetic_batch(args.batch)
    steps = {
        PUBLIC: public_step(model(), batch),
        "mi_kernels, concat critics": our_step(model(), batch),
        "mi_kernels, inner-product critics": our_step(model("cosine"), batch),
    }
    measured = partial(table.rows, "FactorCL-SSL step", {"B": args.batch}, steps, PUBLIC, 2.0)
    found = measured(least=args.repetitions)
    print(machine.write("cpu_factorcl", found, table.COLUMNS))


if __name__ == "__main__":
    main()
