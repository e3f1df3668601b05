"""Whether the dependency penalty helps on real data: five seeds, every arm paired by seed with weight 0.

    python -m bench.mdm_evidence [--cases mmmo-mfn,...] [--json bench/results/mdm_evidence.json]

A case is a data set and a base. Its choices are made on validation rows, on a seed that is not reported: first the
learning rate of the base alone (3 trials), which all arms share, then the weight of each measure (4 trials each). The
arms are the base ("weight 0"), the three measures with a quarter as many shuffled rows as rows, "kl" with as many and
with an eighth as many (the default since), the two controls of "kl" (all modalities moved by one permutation; an
untrained critic), these at the weight chosen for "kl", and the base on each modality alone. "linear" is a probe on the
pooled inputs, of all modalities and of each alone. Every model is also scored on test rows whose modalities are damaged
(``models.mdm.robustness``).

Writes the file after every run and goes on from it: a run whose settings are already there is kept, with the commit
it was made at. A quarter is pinned here (``NEGATIVES``), because it was the default of the first runs. Runs from before
there were at least four shuffled rows have two or three where a batch has fewer than 16 rows (at an eighth, 32): the
last batch of an epoch.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.kept import Kept
from bench.trained import gain, linear, moments, paired, run_cases, scored, trained
from models.data import load
from models.evaluation.metrics import primary
from models.mdm.robustness import KINDS, damaged
from models.settings import RunConfig, from_dict

RESULTS = Path(__file__).parent / "results" / "mdm_evidence.json"
SEEDS, SEARCH_SEEDS = (0, 1, 2, 3, 4), (1000,)
RATES = (1e-3, 3e-3, 1e-2)
WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0)
NEGATIVES = 0.25
MEASURES = ("kl", "f", "wasserstein")
MFN = {"name": "mfn", "hidden": 32, "memory": 32, "networks": 64}
MULT = {"name": "mult", "sizes": {"dim": 16, "heads": 4, "layers": 1, "memory_layers": 1}}
DATA: dict[str, dict[str, Any]] = {
    "mmmo": {"name": "mmmo"},
    "utd-mhad": {"name": "utd-mhad", "modalities": ["skeleton", "inertial"]},
    "mosi": {"name": "mosi", "split": "official", "modalities": ["tokens", "audio"]},
    "mosi-vectors": {"name": "mosi", "split": "acl17", "modalities": ["text", "audio", "video"]},
    "mosi-heldout": {"name": "mosi", "split": "heldout31", "modalities": ["text", "audio", "video"]},
}
TRAINING: dict[str, dict[str, Any]] = {
    "mmmo": {"epochs": 25, "batch_size": 32},
    "utd-mhad": {"epochs": 20, "batch_size": 32},
    "mosi": {"epochs": 8, "batch_size": 64},
    "mosi-vectors": {"epochs": 20, "batch_size": 64},
    "mosi-heldout": {"epochs": 20, "batch_size": 64},
}
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "mfn": {"mmmo": MFN, "utd-mhad": MFN | {"stride": 6, "align": 16}, "mosi": MFN | {"align": 16}},
    "mult": {"mmmo": MULT, "utd-mhad": MULT | {"stride": 12}, "mosi": MULT},
    "lmf": {"mosi-vectors": {"name": "lmf"}, "mosi-heldout": {"name": "lmf"}},
}
CASES = (
    *("mmmo-mfn", "utd-mhad-mfn", "mosi-mfn", "mosi-vectors-lmf", "mosi-heldout-lmf"),
    *("mmmo-mult", "utd-mhad-mult", "mosi-mult"),
)


def config_of(case: str, arm: dict[str, Any], seed: int, lr: float) -> RunConfig:
    """The settings of one run. ``arm`` holds settings of mdm, or "only": a modality that the base sees alone."""
    name, _, kind = case.rpartition("-")
    base, data = BASES[kind][name], DATA[name]
    training = {**TRAINING[name], "lr": lr, "clip": 1.0, "select": "best", "validate": 1, "seed": seed, "threads": 1}
    if "only" in arm:
        return from_dict({"model": base, "data": data | {"modalities": [arm["only"]]}, "training": training})
    model = {"name": "mdm", "base": base, "critic_lr": 1e-3, "critic_steps": 3, "negatives": NEGATIVES, **arm}
    return from_dict({"model": model, "data": data, "training": training})


def measured(config: RunConfig) -> dict[str, Any]:
    """Trains and scores one run."""
    raw = load(replace(config.data, standardise=False), config.seed)
    data = raw.standardised()
    model, found = trained(config, data)
    metric = primary(data.target)
    found["damaged"] = {
        name: {kind: scored(model, damaged(raw, name, kind).standardised(), "test")[metric] for kind in KINDS}
        for name in (data.names if len(data.names) > 1 else ())
    }
    return found


def metric_of(case: str) -> str:
    return "accuracy" if case.startswith("utd-mhad") else "mae"


def chosen(case: str, kept: Kept) -> tuple[float, dict[str, float], list[dict[str, Any]]]:
    """The learning rate, the weight of each measure, and what was tried: means over the search seeds."""
    tried: list[dict[str, Any]] = []

    def best(options: tuple[float, ...], run: Any, what: str) -> float:
        values = []
        for option in options:
            found = [run(option, seed)["valid"][metric_of(case)] for seed in SEARCH_SEEDS]
            values.append(statistics.fmean(found))
            tried.append({"what": what, "value": option, "valid": found})
        return max(zip(options, values, strict=True), key=lambda pair: gain(metric_of(case), pair[1], 0.0))[0]

    def rate(lr: float, seed: int) -> dict[str, Any]:
        config = config_of(case, {"weight": 0.0}, seed, lr)
        return kept.run(case, f"search, lr {lr:g}, seed {seed}", config.to_dict(), lambda: measured(config))

    lr = best(RATES, rate, "lr of the base")
    weights = {}
    for measure in MEASURES:

        def weight(value: float, seed: int, measure: str = measure) -> dict[str, Any]:
            arm = {"measure": measure, "weight": value}
            config = config_of(case, arm, seed, lr)
            key = f"search, {measure} {value:g}, seed {seed}"
            return kept.run(case, key, config.to_dict(), lambda: measured(config))

        weights[measure] = best(WEIGHTS, weight, f"weight of {measure}")
    return lr, weights, tried


def arms_of(case: str, weights: dict[str, float]) -> dict[str, dict[str, Any]]:
    kl = {"measure": "kl", "weight": weights["kl"]}
    arms: dict[str, dict[str, Any]] = {"weight 0": {"weight": 0.0}}
    arms |= {measure: {"measure": measure, "weight": weights[measure]} for measure in MEASURES}
    arms["kl, as many negatives as rows"] = kl | {"negatives": 1.0}
    arms["kl, an eighth as many"] = kl | {"negatives": 0.125}
    arms["control, same permutation"] = kl | {"control": "same"}
    arms["control, random critic"] = kl | {"control": "random"}
    name, _, kind = case.rpartition("-")
    if kind != "mult":  # which needs two modalities
        arms |= {f"{modality} alone": {"only": modality} for modality in _modalities(name)}
    return arms


def _modalities(name: str) -> list[str]:
    return DATA[name].get("modalities", ["audio", "video"])


def summary(case: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per arm: mean and deviation on test rows, gain over weight 0 and its p-value, and the damaged scores."""
    metric = metric_of(case)
    values = {arm: [run["test"][metric] for run in runs] for arm, runs in found.items()}
    rows = []
    for arm, own in values.items():
        row: dict[str, Any] = {"arm": arm, metric: moments(own), "seeds": len(own)}
        if "valid" in found[arm][0]:
            row["valid"] = moments([run["valid"][metric] for run in found[arm]])
        if "accuracy_2" in found[arm][0]["test"]:
            row["accuracy_2"] = moments([run["test"]["accuracy_2"] for run in found[arm]])
        if arm != "weight 0":
            gains = [gain(metric, a, b) for a, b in zip(own, values["weight 0"], strict=True)]
            row["gain"] = moments(gains) | paired(gains)
        row["damaged"] = {
            name: {kind: moments([run["damaged"][name][kind] for run in found[arm]]) for kind in KINDS}
            for name in found[arm][0].get("damaged", ())
        }
        rows.append(row)
    return rows


def study(kept: Kept, case: str) -> dict[str, Any]:
    """Searches and trains every arm of a case."""
    lr, weights, tried = chosen(case, kept)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms_of(case, weights)}
    for seed in SEEDS:
        for arm, settings in arms_of(case, weights).items():
            config = config_of(case, settings, seed, lr)
            found[arm].append(kept.run(case, f"{arm}, seed {seed}", config.to_dict(), partial(measured, config)))
        config = config_of(case, {"weight": 0.0}, seed, lr)
        probed = lambda c=config: linear(load(c.data, c.seed))  # noqa: E731
        probes = kept.run(case, f"linear, seed {seed}", config.to_dict()["data"], probed)
        alone = {f"linear, {name} alone": scores for name, scores in probes["alone"].items()}
        for name, scores in {"linear": probes["test"], **alone}.items():
            found.setdefault(name, []).append({"test": scores})
    return {
        "metric": metric_of(case),
        "config": config_of(case, {"weight": 0.0}, 0, lr).to_dict(),
        "lr": lr,
        "weights": weights,
        "search": tried,
        "rows": summary(case, found),
    }


if __name__ == "__main__":
    run_cases(__doc__ or "", CASES, RESULTS, study)
