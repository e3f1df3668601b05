"""Copied rows, outliers and time series: which data cause a warning, and which do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.estimate import screening
from mi_kernels.estimate.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")


def independent(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, y


def warned(found: mk.MIEstimate, kind: str) -> list[str]:
    return [w for w in found.warnings if w.startswith(kind)]


def test_copied_rows_are_left_out_and_named() -> None:
    x, y = independent(500)
    found = mk.estimate_mi(x.repeat(20, 1), y.repeat(20, 1), max_steps=300, progress=False)
    assert sum(found.samples.values()) == 500 and abs(found.value) <= 3 * found.standard_error + 1e-3
    assert "9500 of 10000 rows" in warned(found, "copies")[0] and "20 times" in warned(found, "copies")[0]


def test_copies_of_discrete_labels_beside_a_continuous_side() -> None:
    x, y = independent(200)
    label = (x[:, 0] > 0).double()
    kept, notes = screening.without_copies(label[:, None].repeat(3, 1), y.repeat(3, 1))
    assert kept.tolist() == list(range(200)) and len(notes) == 1


@pytest.mark.parametrize("kind", ["integers", "halves", "label of integers", "sensor at its limit", "one-sided"])
def test_repeated_values_of_other_kinds_are_no_copies(kind: str) -> None:
    x, y = independent(2000)
    if kind == "integers":
        x = y = x[:, :1].mul(100).round()
    elif kind == "halves":
        x, y = x.round() / 2, (x + y).round() / 2
    elif kind == "label of integers":
        y = y[:, :1].mul(200).round()
        x = y.abs() % 7
    elif kind == "sensor at its limit":
        x, y = x.clone(), y.clone()
        x[:700], y[:700] = 1.5, -1.5
    else:
        x = x[:400].repeat(5, 1)
    assert screening.without_copies(x, y).notes == []


def test_equal_rows_have_equal_hashes_and_others_do_not() -> None:
    v = torch.cartesian_prod(*[torch.arange(-12.0, 12.0, dtype=torch.float64)] * 3)
    hashes = screening._hash(torch.cat([v, v.flip(0)]))
    assert torch.equal(hashes[: len(v)], hashes[len(v) :].flip(0)) and hashes.unique().numel() == len(v)
    assert torch.equal(screening._hash(-0.0 * v[:1]), screening._hash(0.0 * v[:1]))


@pytest.mark.parametrize("size", [1e4, 1e12, 1e300])
def test_an_outlier_is_named_and_does_no_harm(size: float) -> None:
    x, y = independent(1000)
    x[7, 1], y[7, 0] = size, -size
    found = mk.estimate_mi(x, y, max_steps=100, progress=False)
    assert abs(found.value) <= 2 * found.standard_error and found.standard_error < 0.1
    messages = warned(found, "outliers")
    assert [m.split(" lies")[0] for m in messages] == ["outliers: row 7 of x", "outliers: row 7 of y"]
    assert "column 1" in messages[0] and "column 0" in messages[1]


def test_heavy_tails_have_no_outliers() -> None:
    x, _ = mk.tasks.FORTY["student-identity-1-1-1"].sample(10_000, 1, dtype=torch.float64)
    assert screening.outliers("x", Preprocessing(x[:5000]), x, torch.arange(10_000)) == []
    placeholder = x.index_fill(0, torch.arange(30), -1e9)
    message = screening.outliers("x", Preprocessing(placeholder), placeholder, torch.arange(10_000))[0]
    assert message.startswith("outliers: rows ") and ", ... of x lie " in message


def series(n: int, slope: float, seed: int) -> Tensor:
    steps = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for k in range(1, n):
        steps[k] += slope * steps[k - 1]
    return steps[:, None]


def test_series_are_warned_of_where_both_sides_are_slow() -> None:
    slow, other, fast = series(1000, 0.9, 0), series(1000, 0.8, 1), series(1000, 0.0, 2)
    message = screening.follows(slow, other)[0]
    assert message.startswith("serial: ") and "time series" in message
    assert screening.follows(slow, fast) == screening.follows(fast, other) == []
    # ties share their mean rank, so that the order in which they come does not count as dependence
    assert screening.follows((fast > 1).double(), (series(1000, 0.0, 3) > 1).double()) == []
