"""One trained run of an evidence table, its statistics over seeds, and the command of a study of several cases."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kept import Kept
from models.data.corruption import CorruptionConfig
from models.data.dataset import Dataset
from models.evaluation import summary
from models.evaluation.metrics import LOWER_IS_BETTER, score
from models.evaluation.scores import outputs, references
from models.model import Model
from models.settings import RunConfig
from models.training.fit import fit


def trained(config: RunConfig, data: Dataset) -> tuple[Model, dict[str, Any]]:
    """The model that ``fit`` returns, and {"fit_seconds", "valid": metrics, "test": metrics} of its head."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = fit(config, data, Path(folder), progress=False).model.eval()
    seconds = round(time.monotonic() - start, 1)
    return model, {"fit_seconds": seconds} | {split: scored(model, data, split) for split in ("valid", "test")}


def scored(model: Model, data: Dataset, split: str, corruption: CorruptionConfig | None = None) -> dict[str, float]:
    """The metrics of the head on the labelled rows of a split, which may be damaged first."""
    rows = data.labelled_rows(split)
    predicted = outputs(model, data, rows, corruption)[1]
    assert predicted is not None and data.labels is not None
    return {name: round(value, 6) for name, value in score(predicted, data.labels[rows], data.target).items()}


def linear(data: Dataset) -> dict[str, Any]:
    """A probe on the pooled inputs, and on those of each modality alone."""
    found = {name: row["test"] for name, row in references(data)["linear"].items()}
    return {"test": found["input"], "alone": {name: scores for name, scores in found.items() if name != "input"}}


def gain(metric: str, value: float, reference: float) -> float:
    """How much better ``value`` is than ``reference``, in the metric's units."""
    return reference - value if metric in LOWER_IS_BETTER else value - reference


def moments(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in summary.moments(values).items()}


def paired(gains: Sequence[float]) -> dict[str, float]:
    """Two-sided p-value of a paired t-test; left out where all differences are the same."""
    from scipy.stats import ttest_1samp

    return {} if len(set(gains)) == 1 else {"p": round(float(ttest_1samp(list(gains), 0.0).pvalue), 4)}


def prepare() -> None:
    """One thread, and no remarks on every run: a class with one label is meant where labels are few."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The number of unique classes")
    logging.getLogger("models").setLevel(logging.ERROR)


def run_cases(doc: str, cases: Iterable[str], results: Path, study: Callable[[Kept, str], dict[str, Any]]) -> None:
    """The command line of a study: ``study(kept, case)`` for the cases that are asked for, kept under "summary".

    doc: of the module; its third paragraph says in the file what the file holds.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--cases", default=",".join(cases), help="separated by commas")
    parser.add_argument("--json", type=Path, default=results)
    given = parser.parse_args()
    prepare()
    before = json.loads(given.json.read_text()) if given.json.is_file() else {}
    kept = Kept(given.json, " ".join(doc.split("\n\n")[2].split()))
    kept.content["summary"] = before.get("summary", {})
    for case in given.cases.split(","):
        kept.content["summary"][case] = found = study(kept, case)
        kept.write()
        for row in found["rows"]:
            print(case, row, flush=True)
