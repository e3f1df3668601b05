"""The benchmark command: what counts as a regression, and that every case and table runs with its smallest settings."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

import mi_kernels as mk
from bench import __main__ as command
from bench import growth, steps, suite
from bench.compare import ROOT, judge, median_interval

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(factor: float, pairs: int, seed: int) -> tuple[list[float], list[float]]:
    """Paired times with 5 % noise: slow phases of the machine affect both sides, outliers only one."""
    draw = random.Random(seed)
    before, after = [], []
    for _ in range(pairs):
        moment = 1e-3 * (3.0 if draw.random() < 0.2 else 1.0)
        noise = lambda: math.exp(draw.gauss(0, 0.05)) * (4.0 if draw.random() < 0.03 else 1.0)  # noqa: E731
        before.append(moment * noise())
        after.append(factor * moment * noise())
    return before, after


@pytest.mark.parametrize(("factor", "verdict"), [(1.15, "slower"), (1.0, "same"), (0.85, "faster")])
def test_a_change_is_told_from_noise(factor: float, verdict: str) -> None:
    found = [judge("case", *noisy(factor, 200, seed), 0.03, 0.01).verdict for seed in range(20)]
    assert found.count(verdict) >= 18 and not set(found) - {verdict, "unclear"}


def test_noise_alone_is_hardly_ever_a_regression() -> None:
    found = [judge("case", *noisy(1.0, 25, seed), 0.0, 0.05).verdict for seed in range(400)]
    assert found.count("slower") <= 20  # 2.5 % of 400 are expected at most


def test_few_pairs_give_no_verdict() -> None:
    assert judge("case", [1.0] * 4, [2.0] * 4, 0.03, 0.05).verdict == "unclear"
    assert median_interval([1.0, 2.0, 3.0], 0.05) == (-math.inf, math.inf)


@pytest.mark.parametrize("n", [6, 9, 20, 75])
def test_the_interval_of_the_median_has_its_confidence(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    inside = 0
    for draws in torch.randn(2000, n, generator=generator).tolist():
        low, high = median_interval(draws, 0.05)
        inside += low <= 0 <= high
    assert inside >= 0.94 * 2000


def test_a_slower_checkout_ends_with_status_1(tmp_path: Path) -> None:
    """Compares this checkout with itself; in the second process every step takes twice as long."""
    out = tmp_path / "verdicts.json"
    arguments = ["compare", str(ROOT), "--only", "loss/clip_loss", "--seconds", "0.1", "--slow", "1", "--out", str(out)]
    assert command.main(arguments) == 1
    (verdict,) = json.loads(out.read_text())["verdicts"]
    assert verdict["verdict"] == "slower" and verdict["low"] > 1.03


def test_cases_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match="no case has 'lose/'"):
        suite.chosen(["lose/"])
    with pytest.raises(SystemExit):
        command.main(["run", "nothing"])


@pytest.mark.parametrize("name", [n for n in suite.cases() if not n.startswith(("step/", "layer/mult"))])
def test_every_case_runs(name: str) -> None:
    suite.cases()[name]()()


# What has no case of its own: estimate_mi has tables (bench.mi_tasks), the others compute nothing on a batch.
WITHOUT_A_CASE = {"MIEstimate", "backends", "compat", "distributed", "estimate_mi", "tasks", "use_backend"}
CALLED = {  # in the names of cases
    "cross_attention": "attention",
    "cross_attention_grouped": "grouped",
    **{f"{name.capitalize()}Critic": name for name in ("bilinear", "concat", "dot", "joint", "separable")},
}


def test_every_public_function_and_module_has_a_case() -> None:
    words = {word for case in suite.cases() for word in case.split("/")[1].split()}
    assert {name for name in mk.__all__ if CALLED.get(name, name) not in words | WITHOUT_A_CASE} == set()


def test_training_steps_agree_with_plain_torch_and_say_their_shares() -> None:
    for system in ("factorcl-ssl", "mfm", "mird", "mdm"):
        steps.check(system, rows=6)
    found = steps.shares(suite.training("factorcl-ssl", rows=8)[1])
    assert 0 < found["share_of_losses"] < 1 and found["share_of_layers"] == 0


def test_slopes_of_growth() -> None:
    sizes = [64, 128, 256, 512, 1024]
    assert growth.slope(sizes, [5.0 + 1e-3 * n**2 for n in sizes]) == pytest.approx(2, abs=0.1)
    assert growth.slope(sizes, [3.0 * n for n in sizes]) == pytest.approx(1)


def test_a_row_of_growth() -> None:
    row = growth.measure("info_nce", "B", lambda n: growth.info_nce(batch=n, width=16), [16, 32, 64], 0.02)
    assert row["sizes"] == [16, 32, 64] and math.isfinite(row["exponent"])


def test_every_table_has_its_module() -> None:
    for name, table in command.TABLES.items():
        module = table.command[1] if table.command else f"bench.{name}"
        if module.startswith("bench."):
            assert (ROOT / "bench" / f"{module.partition('.')[2]}.py").exists()
