"""What each quirk of MIRD's public code does to a run: the table of ``as_published`` switches, trained anew."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from models import settings
from models.data.dataset import Dataset
from models.evaluation.metrics import primary, score
from models.evaluation.runs import write_json
from models.evaluation.scores import outputs
from models.evaluation.summary import moments
from models.mird.config import QUIRKS
from models.mird.model import MIRD
from models.provenance import describe
from models.settings import RunConfig
from models.training.fit import fit, load_data

matplotlib.use("Agg")

NAME = "mird-quirks"
SHORT = {"training.epochs": 40}  # all arms together take about seven minutes of one core


def quirks(out: Path, quick: bool = False) -> str:
    """Each quirk alone, none and all of those that act, over three seeds (quick: one seed, one epoch).

    Settings are those of the run in OUT, or of ``configs/mird/utd-mhad.yaml`` with fewer epochs. Of every run: the
    metric on test rows and its difference from the run of the same seed without quirks, CLUB's values summed over the
    pairs on validation rows (nats; far from 0 either way is a bound that was not held), and the seconds of its
    training. A quirk of what the data or the settings lack is named with the reason.
    """
    found = (out / settings.FILE).is_file()
    config = settings.read(out) if found else settings.starting_point("mird", "utd-mhad").changed(SHORT)
    if config.name != "mird":
        raise ValueError(f"{out} holds a run of {config.name}; {NAME} reads runs of mird")
    if quick:
        config = config.changed({"training.epochs": 1})
    data, machine = load_data(config), describe()
    idle = {quirk: reason for quirk in QUIRKS if (reason := without_effect(quirk, config, data))}
    acting = [quirk for quirk in QUIRKS if quirk not in idle]
    arms: dict[str, list[str]] = {"none": []} | {quirk: [quirk] for quirk in acting} | {"all": acting}
    metric, seeds = primary(data.target), 1 if quick else 3
    runs = {arm: [_scored(config, names, seed, metric) for seed in range(seeds)] for arm, names in arms.items()}
    rows: list[dict[str, Any]] = []
    for arm, own in runs.items():
        means = {key: moments([run[key] for run in own]) for key in own[0]}
        changes = [run[metric] - plain[metric] for run, plain in zip(own, runs["none"], strict=True)]
        first = {metric: means.pop(metric), "difference": moments(changes)}
        rows.append({"arm": arm, **first, **means})
    sizes = {split: len(data.labelled_rows(split)) for split in ("train", "test")} | {"seeds": seeds}
    content = {"machine": machine, "metric": metric, "config": config.to_dict(), "sizes": sizes, "rows": rows}
    write_json(out / f"{NAME}.json", content | {"without_effect": idle})
    draw(out / f"{NAME}.svg", rows, metric)
    keys = list(rows[0])[1:]
    lines = [" | ".join(["quirk", *keys])]
    for row in rows:
        lines.append(" | ".join([row["arm"], *(f"{row[k]['mean']:.3f} ± {row[k]['deviation']:.3f}" for k in keys)]))
    return "\n".join([*lines, *(f"{quirk}: no effect here, {reason}" for quirk, reason in idle.items())])


def without_effect(quirk: str, config: RunConfig, data: Dataset) -> str:
    """Why a quirk changes nothing in such a run; empty where it may."""
    model = config.model
    tokens = any(modality.is_tokens for modality in data.modalities)
    encoder = tokens and model.agnostic in ("auto", "wsa", "wa", "mag")
    if quirk == "random_encoder" and not (encoder and model.text.name):
        return "the agnostic encoder has no checkpoint"
    if quirk == "text_padding" and not (tokens and model.language == "bert"):
        return "no text encoder of its own reads the text"
    if quirk == "token_padding" and not (tokens and model.has("reconstruction")):
        return "no words are decoded"
    if quirk in ("unbounded_mi", "club_range", "fresh_codes") and not model.has("mi"):
        return "the ladder stops before CLUB"
    if quirk == "bare_log" and model.loss != "log-sum":
        return "the loss has no logarithms"
    return ""


def _scored(config: RunConfig, published: list[str], seed: int, metric: str) -> dict[str, float]:
    config = config.changed({"model.as_published": published, "training.seed": seed})
    data = load_data(config)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = fit(config, data, Path(folder), progress=False).model.eval()
    seconds = time.monotonic() - start
    assert isinstance(model, MIRD) and data.labels is not None
    rows = data.labelled_rows("test")
    predicted = outputs(model, data, rows)[1]
    assert predicted is not None
    found = {metric: score(predicted, data.labels[rows], data.target)[metric]}
    if config.model.has("mi"):
        with torch.no_grad():
            codes = model.codes(data.batch(data.rows("valid")).complete())
            found["club"] = float(model.club(*model.sides(codes)).sum())
    return found | {"seconds": seconds}


def draw(path: Path, rows: list[dict[str, Any]], metric: str) -> None:
    """A point and a bar of one deviation per arm."""
    figure = Figure(figsize=(6, 0.35 * len(rows) + 1))
    axis = figure.subplots()
    values, spread = ([row[metric][part] for row in rows] for part in ("mean", "deviation"))
    axis.errorbar(values, range(len(rows)), xerr=spread, fmt="o", capsize=2)
    axis.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"{metric} on test rows")
    figure.savefig(path, bbox_inches="tight")
