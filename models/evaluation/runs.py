"""Scores of trained runs, stored in results.json of each folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.data.corruption import CorruptionConfig
from models.data.dataset import Dataset
from models.evaluation.metrics import primary
from models.evaluation.scores import HEAD, Scored, conditions, damaged, evaluate, headline, references
from models.files import replace_file
from models.model import Model
from models.registry import MODELS, build
from models.settings import FILE, RunConfig, read
from models.training.checkpoint import WEIGHTS
from models.training.fit import load_data, load_run
from models.training.folder import RESULTS


def evaluate_run(folder: Path, split: str = "test") -> dict[str, Any]:
    """Scores the run in ``folder``. Scores on test rows are also written to its results.json.

    scores: of its head, of probes on its representations, and of a probe on the untrained model. references: the
    constant prediction and linear models of the inputs. robustness: scores on corrupted inputs, by kind of corruption.
    """
    config = read(folder)
    data = load_data(config)
    config, model = load_run(folder, data)
    found = evaluate(model, data, split)
    name = headline(model, found.scores)
    result: dict[str, Any] = {
        "model": config.name,
        "data": data.name,
        "seed": config.seed,
        "split": split,
        "metric": primary(data.target),
        "headline": name,
        "scores": found.scores | untrained(config, data, found, split),
        "references": references(data, split),
        "robustness": {
            label: damaged(model, data, found, corruption, split, config.seed)[name]
            for label, corruption in conditions(data).items()
        },
        "config": public(config, data),
    }
    if split == "test":
        replace_file(folder / RESULTS, lambda beside: write_json(beside, result))
    return result


def untrained(config: RunConfig, data: Dataset, found: Scored, split: str) -> dict[str, dict[str, Any]]:
    """A probe on the same model before training: on its headline representation, or on the input of its head."""
    model = build(config.name, config.model, data, config.seed)
    parts = [part for part in found.scores if part != HEAD]
    part = headline(model, found.scores)
    part = parts[0] if part == HEAD else part
    return {f"untrained {part}": evaluate(model, data, split, (part,)).scores[part]}


def evaluate_damaged(
    folder: Path, corruption: CorruptionConfig, split: str = "test"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two results of one run, on clean and on corrupted inputs, with the same heads and probes."""
    config = read(folder)
    data = load_data(config)
    corruption.check(data)
    config, model = load_run(folder, data)
    found = evaluate(model, data, split)
    scores = damaged(model, data, found, corruption, split, config.seed)
    same = {"model": config.name, "seed": config.seed, "metric": primary(data.target)}
    return (
        same | {"label": f"{config.name}, clean", "scores": found.scores},
        same | {"label": f"{config.name}, damaged", "scores": {n: {"test": s} for n, s in scores.items()}},
    )


def public(config: RunConfig, data: Dataset) -> dict[str, Any]:
    """The settings without a user's path."""
    tree = config.to_dict()
    if config.data.is_file:
        tree["data"]["name"] = data.name
    return tree


def find_runs(out: Path) -> list[Path]:
    """Folders of runs at or below ``out``. Raises FileNotFoundError when there is none."""
    found = sorted(path.parent for path in out.rglob(FILE))
    if not found:
        raise FileNotFoundError(f"{out} holds no run; start with: python -m models fit --out {out}")
    return found


# Settings that do not distinguish models: seeds are averaged over, and the others do not change results.
SAME_MODEL = ("training.seed", "training.devices", "training.threads", "data.name")


def results_below(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All runs below ``out`` with their scores, which are computed if they are missing or older than the weights.

    "label" is the name of the model and the settings in which its runs differ, such as "NAME lr=0.01, layers=2".
    """
    found = []
    for folder in find_runs(out):
        path, weights = folder / RESULTS, folder / WEIGHTS
        fresh = path.is_file() and weights.is_file() and path.stat().st_mtime >= weights.stat().st_mtime
        result = json.loads(path.read_text()) if fresh else {}
        found.append((folder, result if "scores" in result else evaluate_run(folder)))
    order = list(MODELS)
    labels = _labels([(folder, result["model"]) for folder, result in found])
    labelled = [(folder, result | {"label": label}) for (folder, result), label in zip(found, labels, strict=True)]
    return sorted(labelled, key=lambda item: (order.index(item[1]["model"]), item[1]["label"], item[1]["seed"]))


def _labels(runs: Sequence[tuple[Path, str]]) -> list[str]:
    settings = [read(folder).flat() for folder, _ in runs]
    differ: dict[str, list[str]] = {}
    for _, model in runs:
        own = [flat for flat, (_, name) in zip(settings, runs, strict=True) if name == model]
        keys = dict.fromkeys(key for flat in own for key in flat if key not in SAME_MODEL)
        differ[model] = [key for key in keys if any(flat.get(key) != own[0].get(key) for flat in own)]
    found = []
    for flat, (_, model) in zip(settings, runs, strict=True):
        last = [key.rsplit(".", 1)[-1] for key in differ[model]]
        names = [short if last.count(short) == 1 else key for key, short in zip(differ[model], last, strict=True)]
        changes = [f"{name}={flat.get(key)}" for name, key in zip(names, differ[model], strict=True)]
        found.append(f"{model} {', '.join(changes)}".strip())
    return found


def shown_parts(model: Model, names: list[str]) -> list[str]:
    """Representations that figures draw."""
    return [name for name in model.shown if name in names] or names


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.write_text(text)
