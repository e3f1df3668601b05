"""What rows without a label are worth to MIRD: UTD-MHAD with 10, 30 and 100 % of the training labels, several seeds.

    python -m bench.mird_labels --out runs/mird_labels --json bench/results/mird_utd_mhad_labels.json

All arms of MIRD see the same batches and differ in what they do with them: "prediction" trains z_S and the head on
the labelled rows, "labelled" adds specific codes, decoders and CLUB on them, "unlabelled" lets the other rows enter
these terms. The weights are those of the last epoch. MIRD's settings were chosen by hand on seed 0 with its test
accuracy in sight: seed 0 is no independent evidence, and the settings are to be chosen anew on validation rows before
the table says more than how the arms compare at these settings. Resumes: a run whose folder holds its score is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from models.evaluation.metrics import score
from models.evaluation.runs import write_json
from models.evaluation.scores import outputs, references
from models.provenance import describe
from models.settings import RunConfig, starting_point
from models.training.fit import fit, load_data

SHARES = (0.1, 0.3, 1.0)
ARMS = {
    "mird, prediction": ("mird", {"model.ladder": "agnostic"}),
    "mird, labelled": ("mird", {"model.ladder": "mi"}),
    "mird, unlabelled": ("mird", {"model.ladder": "unlabelled"}),
    "early-fusion": ("early-fusion", {"training.epochs": 60, "training.batch_size": 64, "training.select": "last"}),
}


def config_of(arm: str, share: float, seed: int) -> RunConfig:
    model, changes = ARMS[arm]
    base = starting_point(model, "utd-mhad")
    return base.changed({**changes, "data.labels": share, "training.seed": seed, "training.threads": 1})


def one(arm: str, share: float, seed: int, out: Path) -> dict[str, Any]:
    """Trains and scores a run, or reads its score."""
    folder = out / f"{arm.replace(', ', '-')}-{share:g}-seed{seed}"
    kept = folder / "labels.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    config = config_of(arm, share, seed)
    data = load_data(config)
    start = time.monotonic()
    model = fit(config, data, folder, progress=False).model
    seconds = time.monotonic() - start
    found: dict[str, Any] = {"arm": arm, "labels": share, "seed": seed, "fit_seconds": round(seconds, 1)}
    found["labelled_train_rows"] = len(data.labelled_rows("train"))
    for split in ("valid", "test"):
        rows = data.labelled_rows(split)
        predicted = outputs(model, data, rows)[1]
        found[split] = score(predicted, data.labels[rows], data.target)["accuracy"]
    if arm == "early-fusion":
        found["linear_test"] = references(data)["linear"]["input"]["accuracy"]
    write_json(kept, found)
    print(f"{arm:18} {share:4.0%} seed {seed}: test {found['test']:.3f}  ({seconds:.0f} s)", flush=True)
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation by arm and share, and the difference that unlabelled rows make, paired by seed."""
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        by_arm = {arm: {r["seed"]: r["test"] for r in runs if r["arm"] == arm and r["labels"] == share} for arm in ARMS}
        by_arm["linear"] = {r["seed"]: r["linear_test"] for r in runs if r["labels"] == share and "linear_test" in r}
        for arm, values in by_arm.items():
            if values:
                rows.append({"labels": share, "arm": arm, **moments(list(values.values()))})
        with_, without = by_arm["mird, unlabelled"], by_arm["mird, labelled"]
        both = sorted(with_.keys() & without.keys())
        if both:
            gains = [with_[seed] - without[seed] for seed in both]
            rows.append({"labels": share, "arm": "unlabelled minus labelled", **moments(gains), **paired(gains)})
    return rows


def moments(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "deviation": deviation, "seeds": len(values)}


def paired(gains: list[float]) -> dict[str, float]:
    """Two-sided p-value of a paired t-test; left out where it is not defined."""
    from scipy.stats import ttest_1samp

    if len(gains) < 2 or len(set(gains)) == 1:
        return {}
    return {"p": float(ttest_1samp(gains, 0.0).pvalue)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mird_labels"))
    parser.add_argument("--json", type=Path, default=Path("bench/results/mird_utd_mhad_labels.json"))
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The number of unique classes")  # one label a class is meant
    machine = describe()
    # At full labels no row lacks one: "labelled" and "unlabelled" are the same run.
    todo = [
        (arm, share, seed)
        for seed in range(given.seeds)
        for share in SHARES
        for arm in ARMS
        if not (share == 1.0 and arm == "mird, labelled")
    ]
    runs = [one(*what, given.out) for what in todo]
    rows = summary(runs)
    for row in rows:
        print(f"{row['labels']:4.0%}  {row['arm']:26} {row['mean']:.3f} ± {row['deviation']:.3f}", row.get("p", ""))
    what = "test accuracy of the head on utd-mhad by share of training labels; set with seed 0's test rows in sight"
    settings = {arm: config_of(arm, 1.0, 0).flat() for arm in ARMS}
    write_json(given.json, {"what": what, "machine": machine, "settings": settings, "summary": rows, "runs": runs})


if __name__ == "__main__":
    main()
