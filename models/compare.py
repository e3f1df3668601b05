"""A comparison: a search per model on validation rows, then every model with its choice over several seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from models.data import PairedData
from models.defaults import trials
from models.evaluation import evaluate, headline, input_features, majority, probe, summarise, validation_accuracy
from models.experiment import evaluate_run
from models.provenance import commit, describe
from models.runs import RunConfig, build, load_data
from models.training import fit

# Apart from every seed that is reported, so that a choice is not made on the weights and splits it is reported on.
SEARCH_SEED = 1000


def trial(config: RunConfig, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Trains one setting; its validation accuracy, or the reason why it has none."""
    data = load_data(config)
    start = time.monotonic()
    try:
        module = fit(config, data, folder, progress=progress)
    except RuntimeError as error:
        if "the loss became" not in str(error):
            raise
        return {"valid": 0.0, "failed": str(error)}
    return {"valid": validation_accuracy(module.model, data), "seconds": round(time.monotonic() - start, 1)}


def search(base: RunConfig, number: int, out: Path, *, progress: bool = True) -> tuple[RunConfig, list[dict[str, Any]]]:
    """The best of ``number`` settings for base.model by validation accuracy (the first of equals), and all of them."""
    tried = []
    for index, changes in enumerate(trials(base.data, number)):
        config = replace(base, **changes, seed=SEARCH_SEED)
        found = _kept(out / f"trial{index}", "trial.json", config, lambda c, f: trial(c, f, progress=progress))
        what = changes or "the defaults"
        print(f"{base.model}, trial {index}: validation accuracy {found['valid']:.3f} with {what}", flush=True)
        tried.append({"settings": changes, **found})
    best = max(tried, key=lambda entry: entry["valid"])
    return replace(base, **best["settings"]), tried


def _kept(folder: Path, name: str, config: RunConfig, run: Any) -> dict[str, Any]:
    """``run(config, folder)``, or what it returned before with the same settings at the same clean commit."""
    path, here = folder / name, commit()
    if path.is_file() and here and not here.endswith("+changes"):
        kept = json.loads(path.read_text())
        if kept.get("commit") == here and RunConfig.read(folder) == config:
            print(f"{folder.name}: kept from an earlier call at this commit", flush=True)
            return kept["found"]
    found = run(config, folder)
    path.write_text(json.dumps({"commit": here, "found": found}, indent=1) + "\n")
    return found


def references(config: RunConfig, data: PairedData) -> list[dict[str, Any]]:
    """What needs no training: a linear model of the (standardised, pooled) input, and untrained encoders."""
    linear = {name: probe(part, data) for name, part in input_features(data, config.segments).items()}
    untrained = build(replace(config, model="simclr"), data)
    return [
        {"model": "linear", "seed": config.seed, "probe": linear},
        {"model": "untrained", "seed": config.seed, "probe": evaluate(untrained, data)},
    ]


def compare(
    base: RunConfig, models: Sequence[str], seeds: Iterable[int], out: Path, *, number: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Every model with every seed in ``out``/MODEL-seedK, each with the best of ``number`` searched settings.

    Without a search (number 0) all models get ``base``. The search trains in ``out``.search/, with a seed of its own.
    Returns what ``--json`` writes.
    """
    chosen: dict[str, RunConfig] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    results: list[dict[str, Any]] = []
    for model in models:
        chosen[model], tried[model] = replace(base, model=model), []
        if number:
            folder = out.with_name(out.name + ".search") / model
            chosen[model], tried[model] = search(chosen[model], number, folder, progress=progress)
    for seed in seeds:
        data = load_data(replace(base, seed=seed))
        results += references(replace(base, seed=seed), data)
        for model in models:
            config = replace(chosen[model], seed=seed)
            print(f"{model}, seed {seed}", flush=True)
            folder = out / f"{model}-seed{seed}"
            results.append(_kept(folder, "run.json", config, lambda c, f, d=data: _run(c, d, f, progress)))
    return {
        "what": f"test accuracy of linear probes on {data.name}; every choice was made on the validation rows",
        "machine": describe(),
        "data": {split: len(data.rows(split)) for split in ("train", "valid", "test")} | {"majority": majority(data)},
        "base": _public(base, data),
        "search": {
            "trials_per_model": number,
            "criterion": "validation accuracy of the probe on a seed that is not reported",
            "seed": SEARCH_SEED,
            "models": tried,
        },
        "chosen": {model: base.changes(config) for model, config in chosen.items()},
        "representation": {model: headline(evaluated) for model, evaluated in _parts(results).items()},
        "summary": summarise(results),
        "runs": results,
    }


def _run(config: RunConfig, data: PairedData, folder: Path, progress: bool) -> dict[str, Any]:
    start = time.monotonic()
    fit(config, data, folder, progress=progress)
    seconds = round(time.monotonic() - start, 1)
    found = evaluate_run(folder)
    return {"model": config.model, "seed": config.seed, "fit_seconds": seconds, "probe": found["probe"]}


def _parts(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {run["model"]: list(run["probe"]) for run in results if run["model"] != "linear"}


def _public(config: RunConfig, data: PairedData) -> dict[str, Any]:
    """The settings without a user's path."""
    return asdict(config) | {"data": data.name if config.data.endswith(".npz") else config.data}


def save(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
