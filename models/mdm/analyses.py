"""MDM's own studies: what its statistics network says about test rows, and what a lost modality costs.

Both read the run that OUT holds, where there is one (``fit --model mdm --out OUT``), and otherwise train the one of
``configs/mdm/mmmo.yaml`` there.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from models import settings
from models.data import load
from models.data.dataset import Dataset
from models.evaluation.metrics import LOWER_IS_BETTER, primary, score
from models.evaluation.probes import Probe, input_features
from models.evaluation.runs import write_json
from models.evaluation.scores import outputs
from models.evaluation.summary import moments
from models.mdm.interpretation import area, deciles, dependency, disagreement, pointwise, ranking, spearman
from models.mdm.model import MDM
from models.mdm.robustness import KINDS, damaged
from models.model import Model
from models.provenance import describe
from models.settings import RunConfig
from models.training.fit import fit, load_data, load_run

matplotlib.use("Agg")

CRITIC, ROBUSTNESS = "mdm-critic", "mdm-robustness"


def critic(out: Path, quick: bool = False) -> str:
    """Ranks the test rows by the estimated dependency of their modalities (``models.mdm.interpretation``).

    Says how well the critic tells test rows from shuffled ones, next to training rows; and whether rows that score low
    are those on which linear models of single modalities disagree, or which the model predicts badly.
    """
    config = _run(out, quick)
    data, machine = load_data(config), describe()
    config, model = load_run(out, data)
    if not isinstance(model, MDM):
        raise ValueError(f"{out} holds a run of {config.name}; {CRITIC} reads runs of mdm")
    found: dict[str, Any] = {"auc": {}}
    shuffles = 2 if quick else 20
    for split in ("train", "test"):
        rows = _complete(data, split)
        joint, product = dependency(model, data, rows, shuffles)
        found["auc"][split] = area(joint, product)
    found["test_groups_in_train"] = _shared_groups(data)
    columns = _columns(model, data, rows) | {"score": pointwise(joint, product)}
    others = [name for name in columns if name != "score"]
    permutations = 99 if quick else 9999
    found["spearman"] = {name: spearman(columns["score"], columns[name], permutations) for name in others}
    found["deciles"] = deciles(columns["score"], {name: columns[name] for name in others})
    found["ranking"] = ranking(data, rows, columns, "score")
    content = {"machine": machine, "config": config.to_dict(), "test_rows": len(rows), **found}
    write_json(out / f"{CRITIC}.json", content)
    _draw_critic(out, joint, product, found)
    lines = [f"AUC of rows against shuffled rows: {found['auc']['train']:.3f} train, {found['auc']['test']:.3f} test"]
    shared = found["test_groups_in_train"]
    if shared is not None:
        lines.append(f"groups of test rows that training rows have too: {shared}")
    for name in others:
        value = found["spearman"][name]
        lines.append(f"score and {name}: rho {value['rho']:+.3f}, p {value['p']:.4f}")
    return "\n".join(lines)


def _run(out: Path, quick: bool) -> RunConfig:
    """The settings of the run in ``out``, which is trained first where there is none."""
    if (out / settings.FILE).is_file():
        return settings.read(out)
    config = settings.starting_point("mdm", "mmmo")
    if quick:
        config = config.changed({"training.epochs": 1})
    fit(config, load_data(config), out, progress=False)
    return config


def _complete(data: Dataset, split: str) -> torch.Tensor:
    """The labelled rows of a split that have every modality."""
    rows = data.labelled_rows(split)
    return rows[torch.stack([modality.has()[rows] for modality in data.modalities]).all(0)]


def _shared_groups(data: Dataset) -> int | None:
    """Groups (speakers, videos) of test rows that training rows have too; None where the data names none."""
    if data.groups is None:
        return None
    train, test = (set(data.groups[data.rows(split)].tolist()) for split in ("train", "test"))
    return len(train & test)


def _columns(model: Model, data: Dataset, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's error on each row, and how far linear models of single modalities disagree there."""
    predicted = outputs(model, data, rows)[1]
    assert predicted is not None and data.labels is not None
    labels = data.labels[rows]
    if data.target.is_classes:
        error = 1 - predicted.softmax(1)[torch.arange(len(rows)), labels]
    else:
        error = (predicted - labels.reshape(len(rows), -1)).abs().mean(1)
    parts = {name: part for name, part in input_features(data).items() if name in data.names}
    single = [Probe(part, data).predict(part[rows.numpy()]) for part in parts.values()]
    return {"disagreement": disagreement(single, data.target.is_classes), "error": error}


def _draw_critic(out: Path, joint: torch.Tensor, product: torch.Tensor, found: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    span = (float(min(joint.min(), product.min())), float(max(joint.max(), product.max())))
    for name, values in (("rows", joint), ("shuffled rows", product)):
        left.hist(values.numpy(), 30, range=span, density=True, alpha=0.6, label=name)
    left.set(xlabel="T", ylabel="density", title=f"test rows, AUC {found['auc']['test']:.3f}")
    left.legend(frameon=False)
    rows = found["deciles"]
    for name in found["spearman"]:
        right.plot([row["score"] for row in rows], [row[name] for row in rows], "o-", label=name)
    right.set(xlabel="score, mean of a tenth of the test rows", ylabel="mean")
    right.legend(frameon=False)
    figure.savefig(out / f"{CRITIC}.svg", bbox_inches="tight")


def robustness(out: Path, quick: bool = False) -> str:
    """Scores of test rows that lose one modality in three ways, for every measure and without the penalty.

    Settings are those of the run in OUT; each arm is trained anew with three seeds (quick: one). Beside them the best
    model of one modality alone, chosen on validation rows: what is robust because it ignores a modality is no better.
    """
    config = _run(out, quick)
    if config.name != "mdm":
        raise ValueError(f"{out} holds a run of {config.name}; {ROBUSTNESS} reads runs of mdm")
    arms = {"weight 0": {"model.weight": 0.0}} | {
        measure: {"model.measure": measure} for measure in ("kl", "f", "wasserstein")
    }
    seeds = range(1 if quick else 3)
    data, machine = load_data(config), describe()
    metric = primary(data.target)
    rows: list[dict[str, Any]] = []
    for arm, changes in arms.items():
        runs = [_scored(config.changed(changes | {"training.seed": seed}), out) for seed in seeds]
        rows.append({"arm": arm, **{key: moments([run[key] for run in runs]) for key in runs[0]}})
    alone = _best_alone(config, data, seeds, out)
    if alone is not None:
        rows.append(alone)
    sizes = {split: len(data.labelled_rows(split)) for split in ("train", "test")} | {"seeds": len(seeds)}
    content = {"machine": machine, "metric": metric, "config": config.to_dict(), "sizes": sizes, "rows": rows}
    write_json(out / f"{ROBUSTNESS}.json", content)
    draw_robustness(out / f"{ROBUSTNESS}.svg", rows, metric)
    keys = [key for key in rows[0] if key not in ("arm", "valid")]
    lines = [" | ".join(["arm", *keys])]
    for row in rows:
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['deviation']:.3f}" if key in row else "-" for key in keys]
        lines.append(" | ".join([row["arm"], *cells]))
    return "\n".join([metric + " on test rows", *lines])


def _scored(config: RunConfig, out: Path) -> dict[str, float]:
    """Trains a run in a folder of its own below OUT; its metric on test rows, clean and damaged, and on valid rows."""
    raw = load(replace(config.data, standardise=False), config.seed)
    data = load_data(config)
    # Left there, it would be taken for a run of OUT by `evaluate`.
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model = fit(config, data, Path(folder), progress=False).model.eval()
    found = {"valid": _value(model, data, "valid"), "clean": _value(model, data, "test")}
    if len(data.names) > 1:
        for name in data.names:
            for kind in KINDS:
                other = damaged(raw, name, kind)
                other = other.standardised() if config.data.standardise else other
                found[f"{name} {kind}"] = _value(model, other, "test")
    return found


def _value(model: Model, data: Dataset, split: str) -> float:
    rows = data.labelled_rows(split)
    predicted = outputs(model, data, rows)[1]
    if predicted is None or data.labels is None:
        raise ValueError(f"{ROBUSTNESS} needs a base with a head, and labels")
    return score(predicted, data.labels[rows], data.target)[primary(data.target)]


def _best_alone(config: RunConfig, data: Dataset, seeds: range, out: Path) -> dict[str, Any] | None:
    """The base on the one modality that is best on validation rows; None for a base that needs several."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in data.names:
        alone = RunConfig(config.model.base.name, config.model.base.settings, config.data, config.training)
        alone = alone.changed({"data.modalities": [name]})
        try:
            found[name] = [_scored(alone.changed({"training.seed": seed}), out) for seed in seeds]
        except ValueError as error:
            if "two modalities" not in str(error):
                raise
            return None
    sign = -1 if primary(data.target) in LOWER_IS_BETTER else 1
    best = max(found, key=lambda name: sign * statistics.fmean(run["valid"] for run in found[name]))
    return {"arm": f"{best} alone", **{key: moments([run[key] for run in found[best]]) for key in found[best][0]}}


def draw_robustness(path: Path, rows: list[dict[str, Any]], metric: str) -> None:
    """A point and a bar of one deviation per arm and damage."""
    keys = [key for key in rows[0] if key not in ("arm", "valid")]
    figure = Figure(figsize=(1.2 * len(keys) + 2, 3.2))
    axis = figure.subplots()
    for index, row in enumerate(rows):
        own = [key for key in keys if key in row]
        places = [keys.index(key) + 0.08 * (index - len(rows) / 2) for key in own]
        values, spread = ([row[key][part] for key in own] for part in ("mean", "deviation"))
        axis.errorbar(places, values, spread, fmt="o", label=row["arm"], capsize=2)
    axis.set(ylabel=metric)
    axis.set_xticks(range(len(keys)), keys, rotation=30, ha="right")
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, bbox_inches="tight")
