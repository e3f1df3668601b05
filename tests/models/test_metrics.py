"""Metrics against scikit-learn, scipy and explicit counts."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from models.batch import Target
from models.evaluation.metrics import better, constant, score

SENTIMENT = Target.regression(1, -3, 3)


def draw(rows=200):
    y = (torch.randn(rows) * 1.5).clamp(-3, 3)
    y[::7] = 0
    y[1::11] = 2.5
    return y + torch.randn(rows), y


def test_sentiment_metrics_follow_their_definitions():
    p, y = draw()
    p[::5] = 0
    found = score(p[:, None], y, SENTIMENT)
    a, b = p.numpy().astype(np.float64), y.numpy().astype(np.float64)
    assert found["mae"] == pytest.approx(np.abs(a - b).mean())
    assert found["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    for name, bound in (("accuracy_7", 3), ("accuracy_5", 2)):
        clipped = [np.round(np.clip(v, -bound, bound)) for v in (a, b)]
        assert found[name] == pytest.approx((clipped[0] == clipped[1]).mean())
    some = b != 0
    assert found["accuracy_2"] == pytest.approx(accuracy_score(b[some] > 0, a[some] > 0))
    assert found["f1_2"] == pytest.approx(f1_score(b[some] > 0, a[some] > 0, average="weighted"))
    assert found["accuracy_2_with_zero"] == pytest.approx(accuracy_score(b >= 0, a >= 0))
    assert found["f1_2_with_zero"] == pytest.approx(f1_score(b >= 0, a >= 0, average="weighted"))


def test_class_metrics_are_scikit_learns():
    scores, y = torch.randn(100, 4), torch.randint(3, (100,))  # one of four classes never occurs
    found = score(scores, y, Target.classes(4))
    assert found["accuracy"] == pytest.approx(accuracy_score(y, scores.argmax(1)))
    assert found["f1"] == pytest.approx(f1_score(y, scores.argmax(1), average="weighted"))


def test_pearson_of_large_means_and_constants():
    y = torch.randn(50, dtype=torch.float64)
    found = score((y * 1e-3 + 1e6)[:, None], y[:, None], Target.regression())
    assert found["pearson"] == pytest.approx(1, abs=1e-6) and set(found) == {"mae", "pearson"}
    assert math.isnan(score(torch.ones(50, 1), y, Target.regression())["pearson"])


def test_several_dimensions_are_averaged():
    p, y = torch.randn(30, 2), torch.randn(30, 2)
    found = score(p, y, Target.regression(2))
    want = np.mean([np.corrcoef(p[:, k], y[:, k])[0, 1] for k in range(2)])
    assert found["pearson"] == pytest.approx(want) and found["mae"] == pytest.approx((p - y).abs().mean().item())


def test_the_best_constant_and_the_better_value():
    assert constant(torch.tensor([2, 0, 2]), Target.classes(3)).argmax().item() == 2
    assert constant(torch.tensor([1.0, 5.0, 2.0]), Target.regression()).item() == 2
    assert better("mae", 0.1, 0.2) and better("accuracy", 0.2, 0.1)
    assert not better("mae", math.nan, 0.2) and not better("accuracy", math.nan, 0.2)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="same rows"):
        score(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), Target.classes(3))
    with pytest.raises(ValueError, match="no labels"):
        score(torch.zeros(2, 3), torch.zeros(2), Target.none())
