"""Tables over seeds: mean and sample deviation of every metric, per model and representation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from models.evaluation.metrics import LOWER_IS_BETTER

SEVERAL_SEEDS = ("beats", "loses to", "is within one deviation of")
ONE_SEED = ("scores better than", "scores worse than", "scores the same as")


def rows_of(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """(model, representation, seed, score) of runs as ``experiment.evaluate_run`` returns them.

    References depend on data and seed alone and are taken once per seed.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in results:
        for model, scores in result.get("references", {}).items():
            for part, score in scores.items():
                rows.setdefault((model, part, result["seed"]), score)
    for result in results:
        for part, score in result["scores"].items():
            rows[result.get("label", result["model"]), part, result["seed"]] = score
    return [(*key, score) for key, score in rows.items()]


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per model and representation: mean and deviation of the primary metric, and of all in "metrics".

    The deviation is the sample's, 0 for a single seed.
    """
    metric = results[0]["metric"] if results else "accuracy"
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for model, part, _, score in rows_of(results):
        found.setdefault((model, part), []).append(score["test"])
    table = []
    for (model, part), scores in found.items():
        metrics = {name: moments([s[name] for s in scores]) for name in scores[0]}
        table.append(
            {
                "model": model,
                "representation": part,
                "metric": metric,
                "mean": metrics[metric]["mean"],
                "deviation": metrics[metric]["deviation"],
                "seeds": len(scores),
                "metrics": metrics,
            }
        )
    return table


def moments(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample deviation, 0 for one value; both NaN where a value is (a constant prediction's correlation)."""
    if any(math.isnan(value) for value in values):
        return {"mean": math.nan, "deviation": math.nan}
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def with_deviation(mean: float, deviation: float, number: int) -> str:
    """A mean and its deviation; only the mean if there is a single value."""
    return f"{shown(mean)} ± {shown(deviation)}" if number > 1 and not math.isnan(mean) else shown(mean)


def best_rows(summary: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the best row and of those within one deviation of it (the larger of the two rows' deviations)."""
    known = [i for i, row in enumerate(summary) if row["mean"] == row["mean"]]
    if not known:
        return []
    sign = -1 if summary[0]["metric"] in LOWER_IS_BETTER else 1
    top = max(known, key=lambda i: sign * summary[i]["mean"])

    def close(row: dict[str, Any]) -> bool:
        spread = max(row["deviation"], summary[top]["deviation"])
        return abs(row["mean"] - summary[top]["mean"]) <= spread

    return [top, *(i for i in known if i != top and close(summary[i]))]


def table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as aligned text: the primary metric with its deviation, then the other means; the best is marked."""
    if not summary:
        return "no results"
    metric = summary[0]["metric"]
    others = [name for name in summary[0]["metrics"] if name != metric]
    width = max(14, *(len(row["model"]) for row in summary))
    part = max(15, *(len(row["representation"]) for row in summary))
    lines = [f"  {'model':{width}} {'representation':{part}} {'test ' + metric:>15}  seeds  {'  '.join(others)}"]
    top = best_rows(summary)[:1]
    for index, row in enumerate(summary):
        values = "  ".join(f"{shown(row['metrics'].get(n, {'mean': math.nan})['mean']):>{len(n)}}" for n in others)
        mark = "*" if index in top else " "
        lines.append(
            f"{mark} {row['model']:{width}} {row['representation']:{part}} "
            f"{with_deviation(row['mean'], row['deviation'], row['seeds']):>15}  {row['seeds']:>5}  {values}"
        )
    return "\n".join(lines)


def verdicts(summary: Sequence[dict[str, Any]], headlines: dict[str, str]) -> list[str]:
    """Comparisons of each trained model with the references and the other models, by more than one deviation.

    With one seed the lines only say which score is better, and the last line explains why.
    """
    sign = -1 if summary and summary[0]["metric"] in LOWER_IS_BETTER else 1
    rows = {(row["model"], row["representation"]): row for row in summary}
    heads = {model: rows[model, part] for model, part in headlines.items() if (model, part) in rows}
    rivals = dict(heads)
    rivals |= {f"linear ({part})": row for (model, part), row in rows.items() if model == "linear"}
    if ("constant", "-") in rows:
        rivals["constant"] = rows["constant", "-"]
    untrained = {row["model"]: row for row in summary if row["representation"].startswith("untrained ")}
    lines, single = [], all(row["seeds"] == 1 for row in heads.values())
    for model, row in heads.items():
        beaten: list[str] = []
        lost: list[str] = []
        close: list[str] = []
        for name, other in [*rivals.items(), *[("itself untrained", u) for m, u in untrained.items() if m == model]]:
            if name != model:
                gap = sign * (row["mean"] - other["mean"])
                spread = max(row["deviation"], other["deviation"])
                (close if abs(gap) <= spread else beaten if gap > 0 else lost).append(name)
        parts = zip(ONE_SEED if single else SEVERAL_SEEDS, (beaten, lost, close), strict=True)
        said = "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts if names)
        lines.append(f"{model} ({row['representation']}) {said or 'stands alone'}.")
    if lines and single:
        lines.append("One seed: the variation of these scores between seeds is unknown.")
    return lines
