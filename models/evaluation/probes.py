"""Linear probes on frozen representations, with every choice made on the validation split."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from models.data import PairedData
from models.encoders import segment_statistics
from models.factorcl import _FactorCL
from models.runs import Model

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
Parts = dict[str, np.ndarray]


@torch.no_grad()
def representations(model: Model, data: PairedData, batch_size: int = 256) -> Parts:
    """Representations [N, *] of every row: "encoder", and for FactorCL "full", "S", "U1", "U2" as well."""
    model.eval()
    chunks: dict[str, list[torch.Tensor]] = {}
    for rows in torch.arange(len(data)).split(batch_size):
        batch = data.batch(rows)
        parts = {"encoder": torch.cat(model.encode(batch.x1, batch.x2), 1)}
        if isinstance(model, _FactorCL):
            s1, u1, s2, u2 = model.factors(batch.x1, batch.x2)
            parts |= {"full": torch.cat([s1, u1, s2, u2], 1), "S": torch.cat([s1, s2], 1), "U1": u1, "U2": u2}
        for name, value in parts.items():
            chunks.setdefault(name, []).append(value)
    return {name: torch.cat(values).numpy() for name, values in chunks.items()}


def input_features(data: PairedData, segments: int = 4) -> Parts:
    """What a linear model sees without an encoder, [N, *]: "x1", "x2" and both as "input".

    Vectors as they are; of sequences the mean and deviation of each of ``segments`` equal parts.
    """
    parts: Parts = {}
    for name, modality in (("x1", data.first), ("x2", data.second)):
        chunks = []
        for rows in torch.arange(len(data)).split(256):
            values, lengths = modality.take(rows)
            chunks.append(values if lengths is None else segment_statistics(values, lengths, segments))
        parts[name] = torch.cat(chunks).numpy()
    return parts | {"input": np.concatenate(list(parts.values()), 1)}


def _fit_probe(
    features: np.ndarray, data: PairedData, strengths: Iterable[float], max_iter: int
) -> tuple[float, float, Any]:
    """Logistic regression on standardised features of train rows: (accuracy on valid, its best C, the model)."""
    y = data.y.numpy()
    train, valid = data.rows("train").numpy(), data.rows("valid").numpy()
    best: tuple[float, float, Any] | None = None
    for strength in strengths:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=max_iter))
        # These products are small: a second BLAS thread, waiting beside torch's, made them fifty times slower.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features[train], y[train])
        score = float(model.score(features[valid], y[valid]))
        if best is None or score > best[0]:
            best = score, strength, model
    if best is None:
        raise ValueError("strengths must hold at least one value")
    return best


def probe(
    features: np.ndarray, data: PairedData, strengths: Iterable[float] = STRENGTHS, max_iter: int = 300
) -> dict[str, float]:
    """Accuracy of logistic regression: fitted on train, its C chosen on valid, scored once on test."""
    valid, strength, model = _fit_probe(features, data, strengths, max_iter)
    test = data.rows("test").numpy()
    return {"test": float(model.score(features[test], data.y.numpy()[test])), "valid": valid, "C": strength}


def headline(parts: Iterable[str]) -> str:
    """The representation that stands for a model: FactorCL's heads (arXiv 2306.05268, D.1), a baseline's encoders."""
    return "full" if "full" in parts else "encoder"


def validation_accuracy(model: Model, data: PairedData, max_iter: int = 300) -> float:
    """The probe's accuracy on the validation rows, for choices between settings; test rows are not scored."""
    parts = representations(model, data)
    return _fit_probe(parts[headline(parts)], data, STRENGTHS, max_iter)[0]


def evaluate(model: Model, data: PairedData) -> dict[str, dict[str, float]]:
    """A probe on each representation of the model."""
    return {name: probe(features, data) for name, features in representations(model, data).items()}


def majority(data: PairedData) -> float:
    """Test accuracy of the most frequent training class."""
    y = data.y[data.rows("train")]
    return float((data.y[data.rows("test")] == y.mode().values).float().mean())


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample deviation of test accuracy over seeds, per model and representation.

    ``results``: one entry per run with "model", "seed" and "probe" as ``evaluate`` returns it.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for run in results:
        for part, score in run["probe"].items():
            scores.setdefault((run["model"], part), []).append(score["test"])
    return [
        {
            "model": model,
            "representation": part,
            "mean": statistics.fmean(values),
            "seeds": len(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        }
        for (model, part), values in scores.items()
    ]


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as aligned text."""
    lines = [f"{'model':14} {'representation':15} {'test accuracy':>15}  seeds"]
    lines += [
        f"{row['model']:14} {row['representation']:15} {row['mean']:7.3f} ± {row['deviation']:.3f}  {row['seeds']:>5}"
        for row in summary
    ]
    return "\n".join(lines)
