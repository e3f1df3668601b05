"""The staircase benchmark and the benchmark on forty tasks: tiny runs, resuming, theoretical values."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

import mi_kernels as mk
from bench import mi_tasks, staircase

pytestmark = pytest.mark.usefixtures("one_thread")


def test_forty_tasks_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mk, "estimate_mi", functools.partial(mk.estimate_mi, max_steps=50))
    # keep the description constant, even if a commit is made between the two runs
    monkeypatch.setattr(mi_tasks.machine, "describe", functools.cache(mi_tasks.machine.describe))
    output = tmp_path / "out.json"
    arguments = ["--only", "1v1-normal-0.75", "--samples", "400", "--output", str(output)]
    mi_tasks.main([*arguments, "--seeds", "0"])
    first = json.loads(output.read_text())
    mi_tasks.main([*arguments, "--seeds", "0", "1"])
    both = json.loads(output.read_text())
    assert both["runs"][0] == first["runs"][0] and both["totals"]["runs"] == 2
    errors = [abs(run["value"] - run["truth"]) for run in both["runs"]]
    assert both["totals"]["mae"] == pytest.approx(sum(errors) / 2)
    assert {"processor", "torch", "commit"} <= set(both["machine"])


def test_a_file_of_another_commit_is_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text(json.dumps({"machine": {"commit": "0000000"}, "runs": []}))
    with pytest.raises(SystemExit):
        mi_tasks.main(["--output", str(output)])


def test_runs_at_the_ceiling_do_not_count_for_coverage() -> None:
    run = {"task": "a", "samples": 100, "truth": 1.0, "value": 1.1, "held_out_value": 1.0, "standard_error": 0.1,
           "sampling_error": 0.01, "covered": True, "at_ceiling": False, "seconds": 1.0}
    totals = mi_tasks.summary([run, run | {"covered": False, "at_ceiling": True, "value": 0.7}])
    assert totals["coverage"] == 1.0 and totals["mae"] == pytest.approx(0.2)
    assert totals["coverage_of_sampling_error_alone"] == 0.0


@pytest.mark.parametrize("critic", ["separable", "concat"])
@pytest.mark.parametrize("training", list(staircase.TRAININGS))
def test_every_training_climbs(training: str, critic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "LEVELS", (2,))
    monkeypatch.setattr(staircase, "SPARSE", 1)
    if critic == "concat":
        monkeypatch.setattr(staircase, "DIM", 2)
    rows = staircase.climb("cubic", training, critic, 20, 0)
    assert rows[0]["estimator"] == training
    for row in rows:
        assert len(row["curve"]) == staircase.CURVE and math.isfinite(row["levels"][0]["mean"])
        assert row["levels"][0]["bias"] == pytest.approx(row["levels"][0]["mean"] - 2)


def test_rows_stand_beside_the_reference_and_are_drawn(tmp_path: Path) -> None:
    level = {"mean": 1.8, "bias": -0.2, "variance": 0.1}
    row = {"data": "gaussian", "critic": "separable", "estimator": "infonce", "steps": 4000,
           "levels": [level | {"truth": t} for t in staircase.LEVELS], "curve": [0.0] * 100}
    first = staircase.with_reference([row])[0]["levels"][0]
    assert (first["reference_mean"], first["reference_variance"], first["closer"]) == (1.64, 0.039, True)
    pytest.importorskip("matplotlib")
    staircase.draw({"rows": [row], "theory": staircase.theory()}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_theory() -> None:
    levels = staircase.theory()
    rho2 = 1 - math.exp(-0.2)
    assert levels[0]["nwj_variance"] == pytest.approx(20 * rho2 / 64 + 53.598 / (64 * 63), rel=1e-4)
    assert levels[-1]["log_n"] == pytest.approx(4.1589, abs=1e-4)
