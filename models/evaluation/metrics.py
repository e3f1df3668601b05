"""Metrics by kind of target, as the literature on sentiment defines them, computed with torchmetrics.

Regression targets on a scale that is symmetric about zero (MOSI: -3 to 3) are also scored as classes. With p the
prediction and y the target:

    accuracy_7, accuracy_5            round(clip(p)) = round(clip(y)), halves to even, clipped to +-3 and +-2
    accuracy_2, f1_2                  p > 0 against y > 0, over the rows with y != 0        ("non0")
    accuracy_2_with_zero, f1_...      p >= 0 against y >= 0, over all rows                   ("has0")
    mae, pearson                      over all rows; means over dimensions where there are several

F1 is weighted by the classes' frequencies in the targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.regression import mean_absolute_error, pearson_corrcoef

from models.batch import Target

LOWER_IS_BETTER = ("mae",)


def primary(target: Target) -> str:
    """The metric that tables show first and that choices are based on."""
    return "accuracy" if target.is_classes else "mae"


def better(metric: str, a: float, b: float) -> bool:
    """Whether ``a`` is the better value; NaN is never better."""
    return a < b if metric in LOWER_IS_BETTER else a > b


def score(found: Tensor, labels: Tensor, target: Target) -> dict[str, float]:
    """Metrics of scores [N, C] against classes [N], or of values [N, K] against targets [N] or [N, K]."""
    if len(found) != len(labels) or not len(labels):
        raise ValueError(f"found and labels must have the same rows and at least one, got {len(found)}, {len(labels)}")
    if target.is_classes:
        return _classes(found.argmax(1), labels, target.size)
    if target.is_regression:
        return _regression(found.double(), labels.reshape(len(labels), -1).double(), target)
    raise ValueError("there is nothing to score: the data has no labels")


def _classes(found: Tensor, labels: Tensor, number: int, suffix: str = "") -> dict[str, float]:
    return {
        f"accuracy{suffix}": float(multiclass_accuracy(found, labels, number, average="micro")),
        f"f1{suffix}": float(multiclass_f1_score(found, labels, number, average="weighted")),
    }


def _regression(found: Tensor, labels: Tensor, target: Target) -> dict[str, float]:
    scores = {"mae": float(mean_absolute_error(found, labels)), "pearson": _pearson(found, labels)}
    if target.size == 1 and target.low is not None and target.high is not None and target.low == -target.high:
        scores |= _sentiment(found[:, 0], labels[:, 0], target.high)
    return scores


def _pearson(found: Tensor, labels: Tensor) -> float:
    """Pearson correlation; NaN if a prediction or a target is constant."""
    values = []
    for p, y in zip(found.unbind(1), labels.unbind(1), strict=True):
        constant = len(p) < 2 or bool((p == p[0]).all()) or bool((y == y[0]).all())
        # Centred and scaled first, because torchmetrics loses small deviations from a large mean.
        values.append(math.nan if constant else float(pearson_corrcoef(_normalised(p), _normalised(y))))
    return sum(values) / len(values)


def _normalised(x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / centred.abs().max()


def _sentiment(found: Tensor, labels: Tensor, high: float) -> dict[str, float]:
    scores = {}
    for bound in (int(high), int(high) - 1):
        if bound >= 1:
            p, y = (t.clamp(-bound, bound).round().long() + bound for t in (found, labels))
            scores[f"accuracy_{2 * bound + 1}"] = _classes(p, y, 2 * bound + 1)["accuracy"]
    scores |= _classes((found >= 0).long(), (labels >= 0).long(), 2, "_2_with_zero")
    some = labels != 0
    if bool(some.any()):
        scores |= _classes((found[some] > 0).long(), (labels[some] > 0).long(), 2, "_2")
    return scores


def constant(labels: Tensor, target: Target) -> Tensor:
    """The best constant prediction, [1, C] or [1, K]: the most frequent class, or the median (least MAE)."""
    if target.is_classes:
        return torch.nn.functional.one_hot(labels.mode().values, target.size)[None].float()
    return labels.reshape(len(labels), -1).median(0, keepdim=True).values
