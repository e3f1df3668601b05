"""The CPU benchmarks: interleaved steps, the compute peak that they are compared with, and peak memory."""

import shutil
import time
from functools import partial

import pytest
import torch

import mi_kernels as mk
from bench import machine, peak, table
from mi_kernels.backends import extension_status


def test_a_slow_contender_has_its_turns_after_the_others() -> None:
    order = []

    def step(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    pauses = {"quick": 0.001, "slow": 0.05, "other": 0.001}
    steps = {name: partial(step, name, seconds) for name, seconds in pauses.items()}
    times = machine.interleaved(steps, 0.02, least=3)
    assert len(times["slow"]) == 3 and len(times["quick"]) == len(times["other"]) >= 3
    assert list(times) == list(steps)
    turns = order[len(steps) :]
    assert turns[-3:] == ["slow"] * 3 and "slow" not in turns[:-3]


def test_rows_carry_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "gflops", lambda threads=None: 100.0)
    steps = {"base": lambda: time.sleep(0.001), "mi_kernels": lambda: time.sleep(0.002)}
    base, ours = table.rows("loss", {"B": 1}, steps, "base", 0.01, flop=1e6, memory=False)
    assert base["over_base"] == 1.0 and ours["over_base"] > 1.0
    for row in (base, ours):
        assert row["of_fp32_peak"] == pytest.approx(row["gflops"] / 100, abs=1e-3)
        assert row["repetitions"] >= 5


def test_the_peak_is_a_rate_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peak.gflops(1)
    if shutil.which("c++") or shutil.which("g++"):
        again = peak.gflops(1)
        assert found is not None and again is not None and again >= found > 0.1
    monkeypatch.setattr(shutil, "which", lambda name: None)
    peak._program.cache_clear()
    assert peak.gflops(1) is None
    peak._program.cache_clear()


@pytest.mark.skipif(extension_status() != "available", reason="needs the compiled extension")
def test_buffers_kept_from_earlier_calls_count_as_memory_of_this_one() -> None:
    x = torch.randn(1024, 128, requires_grad=True)
    y = torch.randn(1024, 128, requires_grad=True)

    def step() -> None:
        mk.info_nce(x, y).backward()

    for _ in range(3):
        step()
    # packed copies of x and y, and one more array of each size: at least 2 MiB, which a warm call takes from its pool
    assert machine.peak_mebibytes(step) > 1.5
