"""Linear probes on frozen representations, with every choice made on the validation split."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from models.batch import Inputs, Target
from models.data.dataset import Dataset, Modality
from models.evaluation.metrics import better, primary, score
from models.layers.encoders import segment_statistics

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
RIDGES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # on 220 rows of 880 features the best was above 1000
Parts = dict[str, np.ndarray]


class Probe:
    """Logistic regression (classes) or ridge regression on standardised features, fitted on labelled training rows.

    Its regularisation is the best on the validation rows (the first of equal ones); ``valid`` is the primary metric
    there.
    """

    def __init__(
        self, features: np.ndarray, data: Dataset, strengths: Iterable[float] | None = None, max_iter: int = 300
    ):
        self.target = data.target
        if data.labels is None:
            raise ValueError(f"data {data.name!r} has no labels to fit a probe on")
        labels = data.labels
        train, valid = data.labelled_rows("train"), data.labelled_rows("valid")
        metric, best = primary(data.target), None
        if len(labels[train].unique()) < 2:
            raise ValueError(f"data {data.name!r} has one class only in its train rows")
        for strength in strengths or (STRENGTHS if data.target.is_classes else RIDGES):
            model = _linear(data.target, strength, max_iter)
            # These products are small, and BLAS threads that compete with torch's made them fifty times slower.
            with warnings.catch_warnings(), threadpool_limits(1):
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(features[train.numpy()], labels[train].numpy())
            value = score(_predicted(model, features[valid.numpy()], data.target), labels[valid], data.target)[metric]
            if best is None or better(metric, value, best[0]):
                best = value, strength, model
        if best is None:
            raise ValueError("strengths must hold at least one value")
        self.valid, self.strength, self.model = best

    def predict(self, features: np.ndarray) -> Tensor:
        """Scores [N, C] of classes, or values [N, K]."""
        return _predicted(self.model, features, self.target)

    def result(self, features: np.ndarray, labels: Tensor) -> dict[str, Any]:
        found = score(self.predict(features), labels, self.target)
        return {"test": found, "valid": self.valid, "strength": self.strength}


def _linear(target: Target, strength: float, max_iter: int) -> Any:
    model = LogisticRegression(C=strength, max_iter=max_iter) if target.is_classes else Ridge(alpha=strength)
    return make_pipeline(StandardScaler(), model)


def _predicted(model: Any, features: np.ndarray, target: Target) -> Tensor:
    if not target.is_classes:
        return torch.from_numpy(np.asarray(model.predict(features))).reshape(len(features), -1)
    scores = torch.full((len(features), target.size), -1.0, dtype=torch.float64)
    # A class without a training row is never predicted.
    scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(features)).double()
    return scores


def probe(features: np.ndarray, data: Dataset, split: str = "test") -> dict[str, Any]:
    """A probe on features [N, *], scored on a split: {"test": {metric: value}, "valid": value, "strength": value}."""
    rows = data.labelled_rows(split)
    assert data.labels is not None
    return Probe(features, data).result(features[rows.numpy()], data.labels[rows])


def input_features(data: Dataset, segments: int = 4) -> Parts:
    """Inputs of linear models without an encoder, [N, *]: every modality by name, and their concatenation as "input".

    Vectors are unchanged. Sequences and embedded tokens give the mean and deviation of each of ``segments`` equal
    parts. Other tokens give the frequencies of the 2,000 most frequent tokens. A missing modality is zero.
    """
    parts = {modality.name: _pooled(modality, segments) for modality in data.modalities}
    if len(parts) == 1:
        return {"input": next(iter(parts.values()))}
    return parts | {"input": np.concatenate(list(parts.values()), 1)}


def _pooled(modality: Modality, segments: int, frequent: int = 2000) -> np.ndarray:
    chunks = []
    common = None
    if modality.is_tokens and modality.table is None:
        common = modality.values.bincount(minlength=modality.vocabulary).argsort(descending=True)[:frequent]
    for rows in torch.arange(len(modality)).split(256):
        x = modality.take(rows)
        if common is not None:
            chunks.append(_shares(x, common, modality.vocabulary))
        elif modality.is_sequence:
            values = x.values if modality.table is None else modality.table[x.values]
            assert x.lengths is not None
            here = (x.lengths > 0)[:, None]
            found = segment_statistics(values, x.lengths.clamp(min=1), 1 if modality.is_tokens else segments)
            chunks.append(found * here)
        else:
            chunks.append(x.values)
    return torch.cat(chunks).numpy()


def _shares(x: Inputs, common: Tensor, vocabulary: int) -> Tensor:
    assert x.lengths is not None
    inside = torch.arange(x.values.shape[1]) < x.lengths[:, None]
    counts = torch.zeros(len(x.values), vocabulary).scatter_add_(1, x.values, inside.float())
    return counts[:, common] / x.lengths[:, None].clamp(min=1)
