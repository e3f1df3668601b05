"""Measures the time that the dependency penalty adds to a step of a base model on this CPU (K = 1), ours and in plain
torch.

    python -m bench.mdm [--seconds 20] [--json bench/results/cpu_mdm.json]

A step is forward, backward and AdamW of the base, and of the critic where there is one. "base" has no penalty. "plain"
is the algorithm as it is written: one pass of the base for the rows and one for the shuffled rows, a critic for each,
then both passes anew, without gradient, for the critic's own step. "ours" is the phases of ``models.mdm``: rows and
shuffled rows in one pass, whose codes the critic's step reuses; "ours, negatives x" has x shuffled rows per row. Plain
and ours minimise the same loss with the same shuffle, which is checked; all run on the same base, with dropout, on one
thread. Times are medians of steps taken in turns; ``added`` is the median over that of the base, less 1. ``gflop``
counts the matrix products of a step on plain torch operators, ``of_fp32_peak`` is their rate over that of fp32
multiply-adds on registers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import peak
from bench.machine import described, interleaved
from models.baselines.fusion import MFNSettings, MulTSettings
from models.batch import Batch, Target
from models.data import Dataset, Modality
from models.mdm import MDM, Settings
from models.mdm.shuffle import with_shuffled
from models.model import Nested
from models.registry import build
from models.training.phases import frozen

DIMS = {"text": 300, "audio": 5, "visual": 20}
BASES: dict[str, tuple[Any, dict[str, int]]] = {
    "mfn": (MFNSettings(), {"batch": 128, "steps": 20}),
    "mfn, small batch": (MFNSettings(), {"batch": 32, "steps": 20}),
    "mult": (MulTSettings(), {"batch": 24, "steps": 50}),
}
SHARES = (1.0, 0.25, 0.125)
TARGET = 0.25


def problem(batch: int, steps: int) -> Dataset:
    """Aligned sequences of the shapes of MOSI, all of full length."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.arange(batch + 1) * steps
    parts = tuple(Modality(n, torch.randn(batch * steps, d, generator=generator), ends) for n, d in DIMS.items())
    labels = torch.randn(batch, generator=generator)
    return Dataset("bench", parts, labels, Target.regression(), torch.zeros(batch, dtype=torch.int64))


def made(base: str, data: Dataset, negatives: float = 1.0) -> MDM:
    name, settings = base.split(",")[0], BASES[base][0]
    config = Settings(base=Nested(name, settings), negatives=negatives, weight=0.1, ramp=0.0, balance="none")
    model = build("mdm", config, data, 0)
    assert isinstance(model, MDM)
    return model.train()


Steps = list[tuple[list[torch.nn.Parameter], Callable[[], Tensor]]]


def stepper(model: torch.nn.Module, steps: Steps) -> Callable[[], None]:
    """Runs steps (parameters, loss) in order, everybody else frozen, as the trainer does."""
    optimizers = [torch.optim.AdamW(parameters, lr=1e-4) for parameters, _ in steps]
    others = [
        [p for p in model.parameters() if id(p) not in {id(q) for q in parameters}] for parameters, _ in steps
    ]

    def step() -> None:
        for (_, loss), optimizer, rest in zip(steps, optimizers, others, strict=True):
            with frozen(rest):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()

    return step


def base_steps(model: MDM, batch: Batch) -> Steps:
    return [(list(model.base.parameters()), lambda: model.base.phases()[0].loss(batch).total)]


def our_steps(model: MDM, batch: Batch) -> Steps:
    main, critic = model.phases()

    def fit() -> Tensor:
        with torch.no_grad():
            codes = critic.fixed(batch)  # type: ignore[misc]
        return critic.loss(codes).total

    return [(main.parameters, lambda: main.loss(batch).total), (critic.parameters, fit)]


def plain_steps(model: MDM, batch: Batch) -> Steps:
    base: Any = model.base
    critic, weight = model.critic, model.config.weight

    def value(joint: Tensor, product: Tensor) -> Tensor:
        t, s = critic(joint).clamp(-20, 20), critic(product).clamp(-20, 20)
        return t.mean() - (s.logsumexp(0) - torch.log(torch.tensor(float(len(s)))))

    def codes() -> tuple[Tensor, Tensor]:
        indices = model.measure.draws.product_indices(batch.size, len(batch.inputs))
        both = with_shuffled(batch, indices, model.config.lengths)
        product = both.take(torch.arange(batch.size, both.size))
        return base.features(batch.inputs), base.features(product.inputs)

    def main() -> Tensor:
        joint, product = codes()
        return base.loss_of(joint, batch).total - weight * value(joint, product)

    def fit() -> Tensor:
        with torch.no_grad():
            joint, product = codes()
        return -value(joint, product)

    return [(list(base.parameters()), main), (list(critic.parameters()), fit)]


def check(base: str, data: Dataset, batch: Batch) -> list[float]:
    """Ours and plain have the same loss, without dropout and with the same shuffle."""
    found = []
    for steps in (our_steps, plain_steps):
        model = made(base, data).eval()
        model.training = True
        found.append(float(steps(model, batch)[0][1]().detach()))
    if abs(found[0] - found[1]) > 1e-4 * abs(found[1]):
        raise RuntimeError(f"the formulations differ on {base}: {found[0]} and {found[1]}")
    return found


def measured(base: str, seconds: float) -> dict[str, Any]:
    sizes = BASES[base][1]
    data = problem(**sizes)
    batch = data.batch(torch.arange(len(data)))
    losses = check(base, data, batch)
    model = made(base, data)
    arms: dict[str, Callable[[], None]] = {
        "base": stepper(model, base_steps(model, batch)),
        "plain": stepper(model, plain_steps(model, batch)),
    }
    for share in SHARES:
        own = made(base, data, share)
        arms[f"ours, negatives {share:g}"] = stepper(own, our_steps(own, batch))
    flop = {name: peak.products(run) for name, run in arms.items()}
    for run in arms.values():
        run()
    times = interleaved(arms, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    most = peak.gflops()
    least = {name: min(values) for name, values in times.items()}
    return {
        "base": base,
        "sizes": sizes,
        "dims": DIMS,
        "loss": losses,
        "rounds": len(times["base"]),
        "median_seconds": medians,
        "added": {name: round(value / medians["base"] - 1, 3) for name, value in medians.items()},
        "added_least": {name: round(value / least["base"] - 1, 3) for name, value in least.items()},
        "gflop": {name: round(value / 1e9, 3) for name, value in flop.items()},
        "of_fp32_peak": {name: peak.share(flop[name], medians[name], most) for name in arms},
        "target": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="per base")
    parser.add_argument("--only", choices=tuple(BASES), nargs="*", default=list(BASES))
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for base in given.only:
        rows.append(measured(base, given.seconds))
        print(base, rows[-1]["added"], "least", rows[-1]["added_least"], flush=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": described(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
