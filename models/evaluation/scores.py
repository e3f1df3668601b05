"""All scores of one model on one split: its head, probes on its representations, and scores on corrupted inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data.corruption import ALL, CorruptionConfig, corrupted
from models.data.dataset import Dataset
from models.evaluation.metrics import LOWER_IS_BETTER, constant, primary, score
from models.evaluation.probes import Parts, Probe, input_features, probe
from models.model import Model

NOISES = (0.5, 1.0, 2.0)
HEAD = "head"


@torch.no_grad()
def outputs(
    model: Model, data: Dataset, rows: Tensor, corruption: CorruptionConfig | None = None, seed: int = 0
) -> tuple[Parts, Tensor | None]:
    """Representations [rows, *] by name and what the head predicts, of rows that may be damaged first."""
    model.eval()
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    chunks: dict[str, list[Tensor]] = {}
    predicted: list[Tensor] = []
    for part in rows.split(256):
        batch = data.batch(part)
        if corruption is not None:
            batch = corrupted(batch, corruption, seed, keep_one=False)
        batch = batch.to(device)
        for name, value in model.representations(batch).items():
            chunks.setdefault(name, []).append(value.float().cpu())
        found = model.predict(batch)
        if found is not None:
            predicted.append(found.float().cpu())
    return {name: torch.cat(values).numpy() for name, values in chunks.items()}, (
        torch.cat(predicted) if predicted else None
    )


def representations(model: Model, data: Dataset) -> Parts:
    """Representations [N, *] of every row, by name."""
    return outputs(model, data, torch.arange(len(data)))[0]


@dataclass
class Scored:
    """A model's probes, fitted once on clean rows, and its scores."""

    scores: dict[str, dict[str, Any]]
    probes: dict[str, Probe]


def evaluate(model: Model, data: Dataset, split: str = "test", only: tuple[str, ...] = ()) -> Scored:
    """Scores "head", if the model has one, and a probe per representation; ``only`` restricts the representations."""
    parts, predicted = outputs(model, data, torch.arange(len(data)))
    rows = data.labelled_rows(split)
    assert data.labels is not None
    scores: dict[str, dict[str, Any]] = {}
    probes: dict[str, Probe] = {}
    if predicted is not None and (not only or HEAD in only):
        valid = data.labelled_rows("valid")
        on_valid = score(predicted[valid], data.labels[valid], data.target)[primary(data.target)]
        scores[HEAD] = {"test": score(predicted[rows], data.labels[rows], data.target), "valid": on_valid}
    for name, features in parts.items():
        if not only or name in only:
            _check_finite(name, features)
            probes[name] = Probe(features, data)
            scores[name] = probes[name].result(features[rows.numpy()], data.labels[rows])
    return Scored(scores, probes)


def _check_finite(name: str, features: np.ndarray) -> None:
    if not np.isfinite(features).all():
        raise RuntimeError(f"representation {name!r} holds values that are not finite")


def damaged(
    model: Model, data: Dataset, found: Scored, corruption: CorruptionConfig, split: str = "test", seed: int = 0
) -> dict[str, dict[str, float]]:
    """Metrics per representation on a split with corrupted inputs; heads and probes are those of clean data."""
    corruption.check(data)
    rows = data.labelled_rows(split)
    assert data.labels is not None
    parts, predicted = outputs(model, data, rows, corruption, seed)
    scores = {}
    if predicted is not None and HEAD in found.scores:
        scores[HEAD] = score(predicted, data.labels[rows], data.target)
    for name, fitted in found.probes.items():
        scores[name] = score(fitted.predict(parts[name]), data.labels[rows], data.target)
    return scores


def conditions(data: Dataset) -> dict[str, CorruptionConfig]:
    """The corruptions with which every run is tested: each modality missing, and noise on all modalities."""
    found = {}
    if len(data.names) > 1:
        found = {f"missing {name}": CorruptionConfig(drop={name: 1.0}) for name in data.names}
    if any(not modality.is_tokens for modality in data.modalities):
        found |= {f"noise {level:g}": CorruptionConfig(noise={ALL: level}) for level in NOISES}
    return found


def headline(model: Model, parts: Mapping[str, Any]) -> str:
    """The name of the head or representation that tables show for the model."""
    return model.headline if model.headline in parts else next(iter(parts))


def validation_value(model: Model, data: Dataset) -> float:
    """The primary metric on the validation rows, larger is better, for choices; test rows are not scored."""
    rows = torch.cat([data.rows("train"), data.rows("valid")])
    parts, predicted = outputs(model, data, rows)
    metric = primary(data.target)
    name = headline(model, {**({HEAD: None} if predicted is not None else {}), **parts})
    if name == HEAD and predicted is not None:
        valid = data.labelled_rows("valid")
        assert data.labels is not None
        everything = predicted.new_zeros(len(data), predicted.shape[1])
        everything[rows] = predicted
        value = score(everything[valid], data.labels[valid], data.target)[metric]
    else:
        features = np.zeros((len(data), parts[name].shape[1]), parts[name].dtype)
        features[rows.numpy()] = parts[name]
        value = Probe(features, data).valid
    if math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


def references(data: Dataset, split: str = "test") -> dict[str, dict[str, Any]]:
    """Baselines without training: "constant" (majority class or median) and "linear" models of the pooled inputs."""
    rows = data.labelled_rows(split)
    assert data.labels is not None
    best = constant(data.labels[data.labelled_rows("train")], data.target)
    valid = data.labelled_rows("valid")
    on_valid = score(best.expand(len(valid), -1), data.labels[valid], data.target)[primary(data.target)]
    guess = {"test": score(best.expand(len(rows), -1), data.labels[rows], data.target), "valid": on_valid}
    return {
        "constant": {"-": guess},
        "linear": {name: probe(features, data, split) for name, features in input_features(data).items()},
    }
