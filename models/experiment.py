"""Trained runs: probe, collect, report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import report
from models.evaluation import evaluate, majority, representations, summarise
from models.provenance import describe
from models.runs import MODELS, RunConfig, load_data
from models.training import load_run

RESULTS = "results.json"


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Probes the run in ``folder``; the result also goes to its results.json."""
    config = RunConfig.read(folder)
    data = load_data(config)
    result: dict[str, Any] = {
        "model": config.model,
        "data": data.name,
        "seed": config.seed,
        "majority": majority(data),
        "config": asdict(config),
        "probe": evaluate(load_run(folder, data).model, data),
    }
    if config.data.endswith(".npz"):
        result["config"]["data"] = data.name
    (folder / RESULTS).write_text(json.dumps(result, indent=1) + "\n")
    return result


def find_runs(out: Path) -> list[Path]:
    """Folders of runs at or below ``out``. Raises FileNotFoundError when there is none."""
    found = sorted(path.parent for path in out.rglob("config.json"))
    if not found:
        raise FileNotFoundError(f"{out} holds no run; start with: python -m models fit --out {out}")
    return found


def write_report(out: Path) -> list[dict[str, Any]]:
    """Probes every run below ``out`` that has no results yet and writes report.html and results.json there."""
    folders = find_runs(out)
    if len({RunConfig.read(folder).data for folder in folders}) > 1:
        raise ValueError(f"the runs below {out} use different data; write one report for each")
    results = []
    for folder in folders:
        path = folder / RESULTS
        fresh = path.is_file() and path.stat().st_mtime >= (folder / "last.ckpt").stat().st_mtime
        result = json.loads(path.read_text()) if fresh and folder != out else evaluate_run(folder)
        results.append((folder, result))
    results.sort(key=lambda item: (MODELS.index(item[1]["model"]), item[1]["seed"]))
    runs: dict[str, list[Path]] = {}
    for folder, result in results:
        runs.setdefault(result["model"], []).append(folder)
    summary = summarise([result for _, result in results])
    shown = results[0][0]
    config = RunConfig.read(shown)
    data = load_data(config)
    parts = representations(load_run(shown, data).model, data)
    if "S" in parts:
        parts = {name: parts[name] for name in ("S", "U1", "U2")}
    seconds = report.step_times(config, data)
    report.write(
        out / "report.html",
        data=data,
        summary=summary,
        chance=majority(data),
        runs=runs,
        parts=parts,
        seconds=seconds,
        config=config,
        common=set(asdict(config)) - set().union(*(config.changes(RunConfig.read(f)) for f in folders)),
    )
    if shown != out:
        write_results(out / RESULTS, [result for _, result in results], seconds)
    return summary


def write_results(path: Path, results: list[dict[str, Any]], seconds: dict[str, float] | None = None) -> None:
    """Runs, their summary and what is needed to read them: versions and threads."""
    content = {
        "summary": summarise(results),
        "seconds_per_step": seconds,
        "runs": results,
        "machine": describe(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
