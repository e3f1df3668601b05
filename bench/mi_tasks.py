"""`estimate_mi` on the forty tasks with known mutual information, N = 10,000 of which half are held out.

    python -m bench.mi_tasks [--only NAME ...] [--seeds 0 1 2] [--samples 10000] [--estimator infonce]
                             [--output bench/results/mi_tasks.json]

Every run is added to the output file as it ends, and a run that the file holds is not repeated: it can be stopped, and
given in pieces. The file is only continued by the commit that began it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import mi_kernels as mk
from mi_kernels.bounds import registry

from . import machine

NOTE = (
    "Defaults of mk.estimate_mi, in nats. Per task: mean, sd and root-mean-square error of the values over seeds, mean "
    "standard error, and the share of runs whose 95 % interval (1.96 standard errors) covers the truth. mae: the mean "
    "absolute error over all runs, mae_held_out that of the values on held-out samples alone. A seed draws the samples "
    "and seeds the estimator. Half of the samples are held out; nothing is chosen on them."
)
# Not the draws on which the estimator was designed (100, 1000 to 1002, 2000 to 2002 and 5000 to 5003).
SAMPLE_SEED = 3000


def run(name: str, seed: int, samples: int, estimator: str = "infonce") -> dict[str, Any]:
    task = mk.tasks.FORTY[name]
    x, y = task.sample(samples, SAMPLE_SEED + seed)
    found = mk.estimate_mi(x, y, estimator=estimator, seed=seed, progress=False)
    low, high = found.interval()
    return {
        "task": name,
        "seed": seed,
        "samples": samples,
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
    """Totals over runs and a row per task."""
    below = [r for r in runs if not r["at_ceiling"]]
    rows = []
    for name in dict.fromkeys(r["task"] for r in runs):
        own = [r for r in runs if r["task"] == name]
        values, truth = [r["value"] for r in own], own[0]["truth"]
        rows.append({
            "task": name,
            "truth": truth,
            "mean": statistics.fmean(values),
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(mk.tasks.FORTY), default=list(mk.tasks.FORTY), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--estimator", choices=registry.estimators(), default="infonce")
    parser.add_argument("--output", type=Path, default=machine.RESULTS / "mi_tasks.json")
    options = parser.parse_args(arguments)
    here = machine.describe()
    runs = []
    if options.output.exists():
        stored = json.loads(options.output.read_text())
        if stored["machine"]["commit"] != here["commit"]:
            parser.error(f"{options.output} is of commit {stored['machine']['commit']}: move it away to begin anew")
        here, runs = stored["machine"], stored["runs"]
    done = {(r["task"], r["seed"], r["samples"], r["estimator"]) for r in runs}
    for seed in options.seeds:
        for name in options.only:
            if (name, seed, options.samples, options.estimator) in done:
                continue
            runs.append(run(name, seed, options.samples, options.estimator))
            content = {"machine": here, "note": NOTE, "totals": summary(runs), "runs": runs}
            options.output.write_text(json.dumps(content, indent=1) + "\n")
            last, total = runs[-1], content["totals"]
            error = f"{last['value'] - last['truth']:+.4f} of {last['truth']:.4f}, se {last['standard_error']:.4f}"
            print(f"{name} seed {seed}: {error}; mae {total['mae']:.4f} coverage {total['coverage']}", flush=True)


if __name__ == "__main__":
    main()
