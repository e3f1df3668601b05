"""Runs a few hundred random calls of fuzz_values, and checks that its bounds detect small errors."""

import pytest
import torch

from tests.losses import fuzz_values


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_random_calls_agree_with_the_formulas() -> None:
    assert fuzz_values.failures(500, seed=10**6) == []


@pytest.mark.parametrize("kind", ["value", "slope", "row"])
def test_small_errors_are_noticed(kind, monkeypatch) -> None:
    right = fuzz_values.ours

    def wrong(call, x, y, scale):
        value = right(call, x, y, scale)
        if kind == "value":
            return value + 1e-3 * (1 + value.detach().abs())
        if kind == "slope":  # changes only the gradient, by a factor of 1.001
            return value + 1e-3 * (value - value.detach())
        row = x[..., :1, :]  # changes only the first row's gradient, by 1e-3 per element
        return value + 1e-3 * (row - row.detach()).mul(row.detach().sign()).sum()

    monkeypatch.setattr(fuzz_values, "ours", wrong)
    long = [call for call in map(fuzz_values.drawn, range(300)) if call.dtype.itemsize > 2 and call.factor == 1.0]
    noticed = [max(fuzz_values.excess(call).values()) > 1 for call in long if call.batch > 1 and call.size == 1.0]
    assert len(noticed) > 5 and sum(noticed) > 0.8 * len(noticed)
