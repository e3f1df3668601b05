"""Compares models: searches the settings of each model on validation rows, then trains each choice over several
seeds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data.dataset import Dataset
from models.evaluation.metrics import primary
from models.evaluation.runs import RESULTS, evaluate_run, public, write_json
from models.evaluation.scores import validation_value
from models.evaluation.summary import summarise
from models.provenance import commit, describe
from models.settings import RunConfig, read
from models.training.fit import fit, load_data
from models.training.folder import holds_work, refuse_folder
from models.training.phases import NotFinite
from models.training.search import SEQUENCES, VECTORS, applicable, trials

# Different from all reported seeds, so that settings are not chosen on the weights and splits that are reported.
SEARCH_SEED = 1000


def space(data: Dataset) -> Mapping[str, Sequence[Any]]:
    """The search space for this data."""
    return SEQUENCES if any(modality.is_sequence for modality in data.modalities) else VECTORS


def trial(config: RunConfig, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Trains one setting. Returns its validation score (larger is better), or the reason why there is none."""
    data = load_data(config)
    start = time.monotonic()
    try:
        module = fit(config, data, folder, overwrite=True, progress=progress)
    except NotFinite as error:
        return {"valid": None, "failed": str(error)}
    value = validation_value(module.model, data)
    seconds = round(time.monotonic() - start, 1)
    return {"valid": value if math.isfinite(value) else None, "seconds": seconds}


def search(
    base: RunConfig, number: int, out: Path, *, progress: bool = True, overwrite: bool = False
) -> tuple[RunConfig, list[dict[str, Any]]]:
    """Searches ``number`` settings. Returns the best on the validation rows (the first of equal ones) and all
    results."""
    tried = []
    base_here = base.changed({"training.seed": SEARCH_SEED})
    for index, drawn in enumerate(trials(space(load_data(base_here)), number)):
        changes = applicable(base, drawn)
        config = base_here.changed(changes)
        folder = out / f"trial{index}"
        found = _kept(folder, "trial.json", config, lambda c, f: trial(c, f, progress=progress), overwrite=overwrite)
        what = changes or "the defaults"
        print(f"{base.name}, trial {index}: {found['valid']} on the validation rows with {what}", flush=True)
        tried.append({"settings": changes, **found})
    best = max(tried, key=lambda entry: -math.inf if entry["valid"] is None else entry["valid"])
    return base.changed(best["settings"]), tried


def _kept(folder: Path, name: str, config: RunConfig, run: Any, *, overwrite: bool = False) -> dict[str, Any]:
    """Returns ``run(config, folder)``, or its earlier result for the same settings at the same clean commit.

    Raises ValueError if the folder holds a run with other settings and ``overwrite`` is False; a run with the same
    settings is repeated.
    """
    if not overwrite and holds_work(folder) and read(folder).differences(config):
        refuse_folder(folder, resumable=False)
    path, here = folder / name, commit()
    if path.is_file() and here and not here.endswith("+changes"):
        kept = json.loads(path.read_text())
        if kept.get("commit") == here and not read(folder).differences(config):
            print(f"{folder.name}: kept from an earlier call at this commit", flush=True)
            return kept["found"]
    found = run(config, folder)
    write_json(path, {"commit": here, "found": found})
    return found


def compare(
    bases: Mapping[str, RunConfig],
    seeds: Iterable[int],
    out: Path,
    *,
    number: int = 0,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains every model with every seed in ``out``/MODEL-seedK, each with the best of ``number`` searched settings.

    bases: the initial settings of each model, all on the same data; used unchanged without a search (number 0). The
    search trains in ``out``.search/ with a separate seed. Folders with runs of other settings are an error unless
    ``overwrite`` is True. Returns the content of ``--json``.
    """
    if not bases:
        raise ValueError("models must name at least one model")
    chosen: dict[str, RunConfig] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    results: list[dict[str, Any]] = []
    for model, base in bases.items():
        chosen[model], tried[model] = base, []
        if number:
            folder = out.with_name(out.name + ".search") / model
            chosen[model], tried[model] = search(base, number, folder, progress=progress, overwrite=overwrite)
    for seed in seeds:
        for model in bases:
            config = chosen[model].changed({"training.seed": seed})
            print(f"{model}, seed {seed}", flush=True)
            folder = out / f"{model}-seed{seed}"
            results.append(_kept(folder, "kept.json", config, lambda c, f: _run(c, f, progress), overwrite=overwrite))
    data = load_data(next(iter(bases.values())))
    return {
        "what": f"test {primary(data.target)} on {data.name}; every choice was made on the validation rows",
        "machine": describe(),
        "data": {split: int((data.split == code).sum()) for code, split in enumerate(("train", "valid", "test"))},
        "base": {model: public(base, data) for model, base in bases.items()},
        "search": {
            "trials_per_model": number,
            "criterion": "validation rows, on a seed that is not reported",
            "seed": SEARCH_SEED,
            "models": tried,
        },
        "chosen": {model: _changes(bases[model], config) for model, config in chosen.items()},
        "representation": {result["model"]: result["headline"] for result in results},
        "summary": summarise(results),
        "runs": results,
    }


def _changes(base: RunConfig, config: RunConfig) -> dict[str, Any]:
    return {name: config.flat()[name] for name in base.differences(config)}


def _run(config: RunConfig, folder: Path, progress: bool) -> dict[str, Any]:
    start = time.monotonic()
    fit(config, load_data(config), folder, overwrite=True, progress=progress)
    seconds = round(time.monotonic() - start, 1)
    result = evaluate_run(folder) | {"fit_seconds": seconds}
    write_json(folder / RESULTS, result)
    return result
