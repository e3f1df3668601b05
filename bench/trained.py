"""One trained run of an evidence table, and its statistics over seeds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.data.corruption import CorruptionConfig
from models.data.dataset import Dataset
from models.evaluation import summary
from models.evaluation.metrics import LOWER_IS_BETTER, score
from models.evaluation.scores import outputs
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


def gain(metric: str, value: float, reference: float) -> float:
    """How much better ``value`` is than ``reference``, in the metric's units."""
    return reference - value if metric in LOWER_IS_BETTER else value - reference


def moments(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in summary.moments(values).items()}


def paired(gains: Sequence[float]) -> dict[str, float]:
    """Two-sided p-value of a paired t-test; left out where all differences are the same."""
    from scipy.stats import ttest_1samp

    return {} if len(set(gains)) == 1 else {"p": round(float(ttest_1samp(list(gains), 0.0).pvalue), 4)}
