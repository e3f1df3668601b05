"""Evaluates every bound while the mutual information rises in steps from 2 to 10 nats (Poole et al. 2019, section 4).

    python -m bench.staircase [--data gaussian cubic] [--only TRAINING ...] [--critic separable] [--steps 4000]
    python -m bench.staircase --figure-only

One critic is trained level by level on new batches of 64. Each batch is evaluated before it is used for training, with
an exponential average of the weights. The statistics are those of the values in the second half of the steps of a
level. Bounds with the same training objective share a run (Jensen-Shannon: js and the three SMILE variants; InfoNCE:
nce_club). Every run is written to the output when it ends and is not repeated later.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.bounds import registry

from . import machine

LEVELS = (2, 4, 6, 8, 10)
DIM, BATCH, LEARNING_RATE, EMBEDDING, AVERAGE = 20, 64, 1e-3, 32, 0.99
LARGEST_GRADIENT = 100.0  # of any weight; normalised objectives stay far below
CURVE, SPARSE = 20, 10  # points per level; steps between two values in the first half
REFERENCE = Path(__file__).parent / "staircase_reference.json"
NOTE = (
    "mean, bias (mean - truth), variance, median and root-mean-square error, in nats, of the values of batches of 64 "
    "in the last half of each level's steps. closer: |bias| is at most the reference's. theory: log_n is the ceiling "
    "of InfoNCE; nwj_variance is d rho^2 / n + (exp(2 I) - 1) / (n (n - 1)), the variance at the exact critic if all "
    "n (n - 1) negative pairs were independent. nce_club is an upper bound; smile is neither. curve: medians of the "
    "values along the steps. No element of a gradient exceeds 100 in training."
)

Build = Callable[[Any, int], nn.Module]  # from a critic and the width of what it takes


def _baseline(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1))


# Bounds that are not climbed with their defaults: curves by name.
VARIANTS: dict[str, dict[str, Build]] = {
    "smile": {
        "smile-1": lambda critic, width: mk.SMILE(critic, 1.0),
        "smile-5": lambda critic, width: mk.SMILE(critic, 5.0),
        "smile-inf": lambda critic, width: mk.SMILE(critic, math.inf),
    },
    "tuba": {"tuba": lambda critic, width: mk.TUBA(critic, _baseline(width))},
    "interpolated": {"interpolated": lambda critic, width: mk.InterpolatedBound(critic, 0.5, _baseline(width))},
}


def _curves(declaration: registry.Declaration) -> dict[str, Build]:
    default: dict[str, Build] = {declaration.name: lambda critic, width: declaration.bound(critic)}
    return VARIANTS.get(declaration.name, default)


def _trainings() -> dict[str, dict[str, Build]]:
    """What trains a critic -> the bounds that are valued at it, the first being the one that trains: every bound on
    pairs that the registry declares."""
    declared = [registry.find(name) for name in registry.estimators()]
    found = {d.name: _curves(d) for d in declared if d.trained_by == d.name}
    for d in declared:
        found[d.trained_by].update(_curves(d))
    return found


TRAININGS = _trainings()


class Climber(nn.Module):
    """A critic and the bounds of one training. A separable critic's networks run once a step, however many bounds are
    valued on their embeddings."""

    def __init__(self, kind: str, training: str):
        super().__init__()
        self.encoders: mk.SeparableCritic | None = None
        critic: mk.DotCritic | mk.ConcatCritic
        if kind == "separable":
            self.encoders = mk.SeparableCritic(DIM, DIM, (256, 256), EMBEDDING, activation="silu")
            critic, width = mk.DotCritic(), EMBEDDING
        else:
            critic, width = mk.ConcatCritic(DIM, DIM, (256, 256), activation="silu"), DIM
        self.bounds = nn.ModuleDict({name: build(critic, width) for name, build in TRAININGS[training].items()})
        self.trainer = training

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x, y) if self.encoders is None else self.encoders.features(x, y)[:2]

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bounds[self.trainer].learning_loss(*self.encode(x, y))

    @torch.no_grad()
    def values(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = self.encode(x, y)
        return {name: bound(a, b) for name, bound in self.bounds.items()}


def _statistics(values: Tensor, truth: float) -> dict[str, float]:
    mean = values.mean().item()
    return {
        "truth": truth,
        "mean": mean,
        "bias": mean - truth,
        "variance": values.var().item(),
        "median": values.median().item(),
        "rmse": (values - truth).square().mean().sqrt().item(),
    }


def climb(data: str, training: str, kind: str, steps: int, seed: int) -> list[dict[str, Any]]:
    """A row per bound that `training` serves."""
    start = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        climber = Climber(kind, training).train()
    # Averaged weights score the batch a little better than the last step's, which jump about, at no further step.
    averaged = copy.deepcopy(climber).eval()
    weights = list(averaged.parameters()), list(climber.parameters())
    optimizer = torch.optim.Adam(climber.parameters(), lr=LEARNING_RATE, foreach=True)
    rows: dict[str, dict[str, Any]] = {
        name: {"data": data, "critic": kind, "estimator": name, "trained_by": training, "steps": steps, "seed": seed,
               "levels": [], "curve": []}
        for name in climber.bounds
    }
    for level in LEVELS:
        task = mk.tasks.gaussian(level, DIM, cubic=data == "cubic")
        values: dict[str, list[Tensor]] = {name: [] for name in climber.bounds}
        for step in range(steps):
            x, y = task.sample(BATCH, generator)
            # The first half is for the curve alone.
            if step >= steps // 2 or step % SPARSE == 0:
                for name, value in averaged.values(x, y).items():
                    values[name].append(value)
            loss = climber.learning_loss(x, y)
            optimizer.zero_grad()
            loss.backward()
            # NWJ's exponentials reach e^80: squared in Adam's second moment they would be infinite for good.
            torch.nn.utils.clip_grad_norm_(climber.parameters(), LARGEST_GRADIENT, norm_type=math.inf)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(*weights, 1 - min(AVERAGE, (step + 1) / (step + 10)))
        for name, found in values.items():
            series = torch.stack(found).double()
            rows[name]["levels"].append(_statistics(series[-(steps // 2) :], level))
            halves = series[: -(steps // 2)], series[-(steps // 2) :]
            medians = [half.view(CURVE // 2, -1).median(-1).values for half in halves]
            rows[name]["curve"] += [round(v, 4) for v in torch.cat(medians).tolist()]
    seconds = round(time.process_time() - start, 1)
    return [row | {"processor_seconds": seconds} for row in rows.values()]


def theory() -> list[dict[str, float]]:
    found = []
    for level in LEVELS:
        rho2 = -math.expm1(-2 * level / DIM)
        variance = DIM * rho2 / BATCH + math.expm1(2 * level) / (BATCH * (BATCH - 1))
        found.append({"truth": level, "log_n": math.log(BATCH), "nwj_variance": variance})
    return found


def with_reference(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each level beside the reference's, where that has the row."""
    key = ("data", "critic", "estimator", "steps")
    known = {tuple(r[k] for k in key): r["levels"] for r in json.loads(REFERENCE.read_text())["rows"]}
    for row in rows:
        for level, other in zip(row["levels"], known.get(tuple(row[k] for k in key), []), strict=False):
            level["reference_mean"], level["reference_variance"] = other["mean"], other["variance"]
            level["closer"] = abs(level["bias"]) <= abs(other["mean"] - level["truth"])
    return rows


PANELS = 4  # in a row


def draw(content: dict[str, Any], path: Path) -> None:
    """A panel per bound: the medians of its values along the steps, a line per kind of data, over the truth."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["estimator"] for row in content["rows"]))
    rows = math.ceil((len(names) + 1) / PANELS)
    figure = Figure(figsize=(2.9 * PANELS, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, PANELS, squeeze=False, sharex=True, sharey=True).flat
    lines = {}
    for name, axis in zip(names, panels, strict=False):
        axis.step([0, *range(1, len(LEVELS) + 1)], [LEVELS[0], *LEVELS], color="black", linewidth=1, label="truth")
        axis.axhline(math.log(BATCH), color="black", linestyle=":", linewidth=1, label=f"log {BATCH}")
        for row in (r for r in content["rows"] if r["estimator"] == name):
            colour = "tab:blue" if row["data"] == "gaussian" else "tab:orange"
            points = len(row["curve"]) // len(row["levels"])
            places = [k / points for k in range(len(row["curve"]))]
            axis.plot(places, row["curve"], color=colour, linewidth=1.4, label=row["data"])
        axis.set(title=name, ylim=(-1, 13), xticks=[k + 0.5 for k in range(len(LEVELS))], xticklabels=LEVELS)
        axis.grid(alpha=0.25)
        lines |= {line.get_label(): line for line in axis.get_lines()}
    for axis in list(panels):  # those that are left
        axis.axis("off")
        axis.legend(lines.values(), lines.keys(), loc="center", frameon=False)
    figure.supxlabel("true mutual information of the level, nats", fontsize="medium")
    figure.supylabel("median of a batch's value, nats", fontsize="medium")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("gaussian", "cubic"), default=["gaussian", "cubic"])
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--critic", choices=("separable", "concat"), default="separable")
    parser.add_argument("--steps", type=int, default=4000, help=f"per level; a multiple of {CURVE * SPARSE}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=machine.RESULTS / "staircase.json")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure of the stored rows")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.steps % (CURVE * SPARSE):
        parser.error(f"--steps must be a multiple of {CURVE * SPARSE}, got {options.steps}")
    here, rows = machine.describe(), []
    if options.output.exists():
        stored = json.loads(options.output.read_text())
        if stored["machine"]["commit"] != here["commit"] and not options.figure_only:
            parser.error(f"{options.output} is of commit {stored['machine']['commit']}: move it away to begin anew")
        here, rows = stored["machine"], stored["rows"]
    done = {(r["data"], r["trained_by"], r["critic"], r["steps"], r["seed"]) for r in rows}
    source = json.loads(REFERENCE.read_text())["source"]
    content: dict[str, Any] = {"machine": here, "note": NOTE, "reference": source, "theory": theory(), "rows": rows}
    for training in options.only if not options.figure_only else ():
        for data in options.data:
            if (data, training, options.critic, options.steps, options.seed) in done:
                continue
            rows += with_reference(climb(data, training, options.critic, options.steps, options.seed))
            machine.save(options.output, content)
            means = [round(level["mean"], 2) for level in rows[-1]["levels"]]
            print(data, training, means, rows[-1]["processor_seconds"], flush=True)
    draw(content, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
