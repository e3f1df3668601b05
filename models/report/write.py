"""report.html and results.json of all runs below a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models.data.dataset import Dataset
from models.evaluation.metrics import LOWER_IS_BETTER, primary
from models.evaluation.runs import RESULTS, results_below, shown_parts, write_json, write_text
from models.evaluation.scores import HEAD, evaluate, outputs
from models.evaluation.summary import moments, summarise, verdicts, with_deviation
from models.files import replace_file
from models.provenance import describe
from models.registry import build, entry
from models.report import figures, page
from models.report.speed import Seconds, step_times
from models.settings import RunConfig, dump, read
from models.training.fit import load_data, load_run
from models.training.history import epochs_of

Found = Sequence[tuple[Path, dict[str, Any]]]


def write_report(out: Path, before: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Scores every run below ``out`` that has no fresh scores; returns their summary.

    before: sections of HTML that the page starts with.

    Raises ValueError when the runs use different data: they cannot stand in one table.
    """
    found = results_below(out)
    if len({(result["data"], result["metric"]) for _, result in found}) > 1:
        raise ValueError(f"the runs below {out} use different data; write one report for each")
    results = [result for _, result in found]
    summary = summarise(results)
    folders: dict[str, list[Path]] = {}
    for folder, result in found:
        folders.setdefault(result["label"], []).append(folder)
    shown = found[0][0]
    config = read(shown)
    data = load_data(config)
    seconds = _seconds({name: read(paths[0]) for name, paths in folders.items()}, data)
    text = _page(found, summary, folders, config, data, seconds, before)
    replace_file(out / "report.html", lambda beside: write_text(beside, text))
    if shown != out:
        content = {
            "summary": summary,
            "seconds_per_step": {name: {b: s._asdict() for b, s in row.items()} for name, row in seconds.items()},
            "runs": results,
            "machine": describe(),
        }
        write_json(out / RESULTS, content)
    return summary


def _seconds(runs: Mapping[str, RunConfig], data: Dataset) -> dict[str, dict[str, Seconds]]:
    """Seconds of a step by label; runs whose model and batch are the same are measured once."""
    known: dict[str, dict[str, Seconds]] = {}
    found = {}
    for label, config in runs.items():
        key = repr((config.name, config.model, config.training.batch_size, config.training.augmentation))
        if key not in known:
            known[key] = step_times(config, data)
        found[label] = known[key]
    return found


def _page(
    found: Found,
    summary: Sequence[dict[str, Any]],
    folders: Mapping[str, Sequence[Path]],
    config: RunConfig,
    data: Dataset,
    seconds: Mapping[str, Mapping[str, Seconds]],
    before: Sequence[str] = (),
) -> str:
    results = [result for _, result in found]
    heads = {result["label"]: result["headline"] for result in results}
    said = "".join(f"<li>{page.text(line)}</li>" for line in verdicts(summary, heads))
    parts, predicted = _of_the_shown_run(found[0][0], data)
    model, metric = found[0][1]["label"], primary(data.target)
    curves = _noise(results, metric)
    machine = describe()
    sections = [
        *before,
        page.section("Runs", _runs(folders, data)),
        page.section(
            "Scores",
            page.scores(summary) + f"<ul>{said}</ul>",
            "Mean and sample deviation over seeds on the test rows; the best row is marked"
            f"{' (lower is better)' if metric in LOWER_IS_BETTER else ''}. One result beats another "
            "here when their means differ by more than the larger deviation. Probes are linear models on standardised "
            "representations, fitted on the training rows; their regularisation, like every other choice, was chosen "
            "on the validation rows. “constant” is the most frequent class or the median, “linear” a linear model of "
            "one pooled modality or of all (“input”), “untrained” a probe on the model before training.",
        ),
        page.section(
            "Training",
            page.figures([*figures.loss_curves(folders), *figures.term_curves(folders)]),
            "One line per seed; the terms are those of the first seed.",
        ),
        page.section(
            f"Representations of {model}",
            page.figures(parts) + page.class_legend(data.target),
            "t-SNE of up to 400 test rows of the first run.",
        ),
        page.section("Predictions", page.figures([predicted] if predicted else [])),
        page.section(
            "Robustness",
            (page.figures([figures.robustness(curves, metric)]) if curves else "") + _missing(results, metric),
            f"Test {metric} with corrupted test inputs and everything else as above; the bands are one deviation.",
        ),
        page.section(
            "Seconds per training step",
            page.speed(seconds),
            f"Median and quartiles in milliseconds of whole steps (batch {config.training.batch_size}), measured in "
            f"turns while this page was written: {page.text(machine['processor'])}, {torch.get_num_threads()} of its "
            f"cores, torch {torch.__version__}. The last backend is the one that runs by default here.",
        ),
        page.section("Settings", _settings(folders)),
    ]
    sizes = ", ".join(
        f"{int((data.split == code).sum())} {name}" for code, name in enumerate(("train", "valid", "test"))
    )
    dims = f" of {data.target.size} dimensions" if data.target.size > 1 else ""
    kind = f"{data.target.size} classes" if data.target.is_classes else f"a regression target{dims}"
    lead = page.text(f"{data.name}: modalities {', '.join(data.names)}; {sizes} rows; {kind}. ")
    written = f"written on {machine['date']}" + (f" at commit {machine['commit']}" if machine["commit"] else "")
    lead += page.text(f"{len(found)} run{'s' * (len(found) > 1)}; this page was {written}.")
    return page.page(f"{', '.join(folders)} on {data.name}", lead, sections)


def _runs(folders: Mapping[str, Sequence[Path]], data: Dataset) -> str:
    """The trained models: one row per label, with the details of its first run."""
    rows = []
    for label, paths in folders.items():
        configs = [read(path) for path in paths]
        config, training = configs[0], configs[0].training
        model = build(config.name, config.model, data, config.seed)
        number = sum(parameter.numel() for parameter in model.parameters())
        epochs = sorted({epochs_of(path) for path in paths})
        seeds = ", ".join(str(c.seed) for c in configs)
        said = f"{epochs[0]}-{epochs[-1]}" if len(epochs) > 1 else f"{epochs[0]}"
        rows.append(
            [label, entry(config.name).summary, f"{number:,}", said, training.batch_size, f"{training.lr:g}", seeds]
        )
    return page.table(["model", "what it is", "parameters", "epochs", "batch", "step size", "seeds"], rows, 2)


def _of_the_shown_run(folder: Path, data: Dataset) -> tuple[list[str], str]:
    """Projections of the representations and a figure of the predictions of one run, on test rows."""
    config, model = load_run(folder, data)
    rows = data.labelled_rows("test")
    assert data.labels is not None
    found, predicted = outputs(model, data, rows)
    names = shown_parts(model, list(found))
    images = figures.projections({n: found[n] for n in names}, data.labels[rows], data.target)
    if predicted is None:
        name = model.headline
        predicted = evaluate(model, data, only=(name,)).probes[name].predict(found[name])
    else:
        name = HEAD
    return images, figures.predictions(predicted, data.labels[rows], data.target, f"{config.name} ({name})")


def _noise(results: Sequence[dict[str, Any]], metric: str) -> dict[str, list[tuple[float, float, float]]]:
    values: dict[str, dict[float, list[float]]] = {}
    for result in results:
        model = values.setdefault(result["label"], {})
        clean = result["scores"][result["headline"]]["test"][metric]
        model.setdefault(0.0, []).append(clean)
        for name, score in result.get("robustness", {}).items():
            if name.startswith("noise "):
                model.setdefault(float(name.split()[1]), []).append(score[metric])
    return {
        model: [_point(level, found) for level, found in sorted(levels.items())]
        for model, levels in values.items()
        if len(levels) > 1
    }


def _missing(results: Sequence[dict[str, Any]], metric: str) -> str:
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        row = values.setdefault(result["label"], {})
        row.setdefault("clean", []).append(result["scores"][result["headline"]]["test"][metric])
        for name, score in result.get("robustness", {}).items():
            if name.startswith("missing "):
                row.setdefault(name, []).append(score[metric])
    shown = {model: {name: _shown(found) for name, found in row.items()} for model, row in values.items()}
    return page.missing(shown) if any(len(row) > 1 for row in shown.values()) else ""


def _point(level: float, values: Sequence[float]) -> tuple[float, float, float]:
    found = moments(values)
    return level, found["mean"], found["deviation"]


def _shown(values: Sequence[float]) -> str:
    found = moments(values)
    return with_deviation(found["mean"], found["deviation"], len(values))


def _settings(folders: Mapping[str, Sequence[Path]]) -> str:
    """The YAML of each model's first run."""
    blocks = (
        f"<details><summary>{page.text(name)}</summary><pre>{page.text(dump(_public(read(paths[0]))))}</pre></details>"
        for name, paths in folders.items()
    )
    return "".join(blocks)


def _public(config: RunConfig) -> RunConfig:
    """Without the folders of a user's file."""
    return config.changed({"data.name": Path(config.data.name).name}) if config.data.is_file else config
