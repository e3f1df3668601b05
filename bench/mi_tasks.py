"""Evaluates `estimate_mi` where the mutual information is known: on the forty tasks, and on pairs that are not
Gaussian.

    python -m bench.mi_tasks [--only NAME ...] [--seeds 0 1 2] [--samples 10000] [--estimator infonce]
                             [--output bench/results/mi_tasks.json]
    python -m bench.mi_tasks --tasks beyond [--samples 100 1000 10000 100000] [--seconds 3600]

Half of the samples are held out. Every run is written to the output file when it ends and is not repeated later, so the
command can be stopped and continued. Only the commit that created the file can continue it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mi_kernels as mk
from mi_kernels.bounds import registry

from . import known_truth, machine

NOTE = (
    "Defaults of mk.estimate_mi, in nats. Per task: mean, sd and root-mean-square error of the values over seeds, mean "
    "standard error, and the share of runs whose 95 % interval (1.96 standard errors) covers the truth. mae: the mean "
    "absolute error over all runs, mae_held_out that of the values on held-out samples alone. A seed draws the samples "
    "and seeds the estimator. Half of the samples are held out; nothing is chosen on them."
)
# Not the draws on which the estimator was designed (100, 1000 to 1002, 2000 to 2002 and 5000 to 5003).
SAMPLE_SEED = 3000
SETS = {"forty": lambda: dict(mk.tasks.FORTY), "beyond": known_truth.tasks}
SAMPLES = {"forty": [10_000], "beyond": [100, 1_000, 10_000, 100_000]}
OUTPUT = {"forty": "mi_tasks.json", "beyond": "mi_truth.json"}


def run(name: str, seed: int, samples: int, estimator: str = "infonce", task: Any = None) -> dict[str, Any]:
    """A row of one estimate. `task`: what `name` stands for, where it is none of the forty."""
    task = mk.tasks.FORTY[name] if task is None else task
    x, y = task.sample(samples, SAMPLE_SEED + seed)
    found = mk.estimate_mi(x, y, estimator=estimator, seed=seed, progress=False)
    low, high = found.interval()
    return {
        "task": name,
        "seed": seed,
        "samples": samples,
        "dims": [x.shape[1], y.shape[1]],
        "estimator": estimator,
        "truth": task.mutual_information,
        "value": found.value,
        "held_out_value": found.held_out_value,
        "standard_error": found.standard_error,
        "sampling_error": found.sampling_error,
        "covered": low <= task.mutual_information <= high,
        "at_ceiling": any(w.startswith("at the ceiling") for w in found.warnings),
        "seconds": round(found.seconds, 1),
        "warnings": list(found.warnings),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over runs and a row per task and number of samples."""
    below = [r for r in runs if not r["at_ceiling"]]
    rows = []
    for name, samples in dict.fromkeys((r["task"], r["samples"]) for r in runs):
        own = [r for r in runs if (r["task"], r["samples"]) == (name, samples)]
        values, truth = [r["value"] for r in own], own[0]["truth"]
        rows.append({
            "task": name,
            "samples": samples,
            "runs": len(own),
            "truth": truth,
            "mean": statistics.fmean(values),
            "bias": statistics.fmean(values) - truth,
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "rmse": statistics.fmean((v - truth) ** 2 for v in values) ** 0.5,
            "standard_error": statistics.fmean(r["standard_error"] for r in own),
            "covered": statistics.fmean(r["covered"] for r in own),
        })
    return {
        "mae": statistics.fmean(abs(r["value"] - r["truth"]) for r in runs),
        "mae_held_out": statistics.fmean(abs(r["held_out_value"] - r["truth"]) for r in runs),
        "bias": statistics.fmean(r["value"] - r["truth"] for r in runs),
        "coverage": statistics.fmean(r["covered"] for r in below) if below else None,
        "coverage_of_sampling_error_alone": (
            statistics.fmean(abs(r["value"] - r["truth"]) <= 1.96 * r["sampling_error"] for r in below)
            if below else None
        ),
        "runs": len(runs),
        "seconds_per_run": statistics.fmean(r["seconds"] for r in runs),
        "tasks": rows,
    }


def by_samples(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Totals for each number of samples."""
    wanted = ("mae", "mae_held_out", "bias", "coverage", "runs", "seconds_per_run")
    found = []
    for samples in sorted({r["samples"] for r in runs}):
        totals = summary([r for r in runs if r["samples"] == samples])
        found.append({"samples": samples, **{name: totals[name] for name in wanted}})
    return found


def planned(options: argparse.Namespace, tasks: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Task, seed and number of samples of every run; every task comes once before one comes twice."""
    for seed in options.seeds:
        for samples in options.samples:
            for name in options.only or tasks:
                most = getattr(tasks[name], "most", None)
                if most is None or samples <= most():
                    yield name, seed, samples


def parsed(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=list(SETS), default="forty")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after that many")
    parser.add_argument("--estimator", choices=registry.estimators(), default="infonce")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    tasks = SETS[options.tasks]()
    if unknown := sorted(set(options.only or []) - set(tasks)):
        parser.error(f"--only knows {', '.join(tasks)}, got {', '.join(unknown)}")
    options.samples = options.samples or SAMPLES[options.tasks]
    options.output = options.output or machine.RESULTS / OUTPUT[options.tasks]
    return parser, options, tasks


def main(arguments: list[str] | None = None) -> None:
    parser, options, tasks = parsed(arguments)
    here, begin = machine.describe(), time.monotonic()
    runs = []
    if options.output.exists():
        stored = json.loads(options.output.read_text())
        if stored["machine"]["commit"] != here["commit"]:
            parser.error(f"{options.output} is of commit {stored['machine']['commit']}: move it away to begin anew")
        here, runs = stored["machine"], stored["runs"]
    done = {(r["task"], r["seed"], r["samples"], r["estimator"]) for r in runs}
    for name, seed, samples in planned(options, tasks):
        if (name, seed, samples, options.estimator) in done:
            continue
        if time.monotonic() - begin > options.seconds:
            break
        runs.append(run(name, seed, samples, options.estimator, tasks[name]))
        totals = summary(runs)
        content = {"machine": here, "note": NOTE, "totals": totals, "by_samples": by_samples(runs), "runs": runs}
        machine.save(options.output, content)
        last = runs[-1]
        error = f"{last['value'] - last['truth']:+.4f} of {last['truth']:.4f}, se {last['standard_error']:.4f}"
        total = f"mae {totals['mae']:.4f} coverage {totals['coverage']}"
        print(f"{name} n {samples} seed {seed}: {error}; {total}", flush=True)


if __name__ == "__main__":
    main()
