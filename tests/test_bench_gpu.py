"""The GPU benchmark runner's logic, tested on a CPU: cases, correctness gate, ratios, time budgets, failing steps."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest
import torch

from bench.gpu import __main__ as runner
from bench.gpu import run, stages
from bench.gpu.cases import cases, plan
from bench.gpu.problem import Case, Problem, answer
from bench.gpu.timing import CpuTimer, summary

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BEST = {"matmul_tflops_float32": 2.0, "copy_gbytes_per_second": 4.0}


class FakeTimer:
    """Runs each step once and reports 2 ms and 3 MiB."""

    def times(self, step, seconds):
        step()
        return [0.002, 0.001, 0.004]

    def peak_bytes(self, step):
        step()
        return 3 << 20


def square(device: torch.device) -> Problem:
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    return Problem(
        [x],
        {"good": lambda: x.square().sum(), "wrong value": lambda: x.square().sum() + 1, "fails": lambda: 1 / 0},
        lambda: (torch.tensor(25.0), [torch.tensor([6.0, 8.0])]),
        flop=4e9,
        moved_bytes=8e6,
        absent={"other": "not installed"},
    )


def test_a_row_carries_time_spread_memory_and_ratios_to_what_the_device_does_at_best():
    found = run.run(Case("g", "n", {"dtype": "float32"}, square), CPU, FakeTimer(), BEST)
    good = found["rows"][0]
    assert good["milliseconds"] == 2.0 and good["quartiles"] == [1.0, 4.0] and good["runs"] == 3
    assert good["peak_mib"] == 3.0
    assert good["tflops"] == pytest.approx(2.0)
    assert good["of_matmul_rate"] == pytest.approx(1.0)
    assert good["over_copy_time"] == pytest.approx(1.0)
    assert found["absent"] == {"other": "not installed"}


def test_a_wrong_contender_gets_no_time_and_a_failing_one_stops_nobody():
    rows = run.run(Case("g", "n", {"dtype": "float32"}, square), CPU, FakeTimer(), BEST)["rows"]
    assert [row["contender"] for row in rows] == ["good", "wrong value", "fails"]
    assert "value is 26" in rows[1]["error"] and "milliseconds" not in rows[1]
    assert rows[2]["error"].startswith("ZeroDivisionError")


def test_a_wrong_gradient_gets_no_time():
    def make(device):
        problem = square(device)
        (x,) = problem.leaves
        problem.contenders = {"half": lambda: x.square().sum() / 2 + x.detach().square().sum() / 2}
        return problem

    (row,) = run.run(Case("g", "n", {}, make), CPU, FakeTimer(), BEST)["rows"]
    assert "gradient of leaf 0" in row["error"]


def test_a_case_that_cannot_be_built_and_one_whose_time_is_spent_are_recorded():
    def broken(device):
        raise MemoryError("no room")

    assert run.run(Case("g", "n", {}, broken), CPU, FakeTimer(), BEST)["error"] == "MemoryError: no room"
    found = run.run(Case("g", "n", {"dtype": "float32"}, square, seconds=-1.0), CPU, FakeTimer(), BEST)
    assert found["rows"] == [] and found["absent"]["good"] == "the case's time was spent"


@pytest.mark.parametrize("index", range(len(cases(quick=True))))
def test_every_quick_case_passes_its_gate(index):
    found = run.run(cases(quick=True)[index], CPU, FakeTimer(), BEST)
    assert "error" not in found
    ours = [row for row in found["rows"] if row["contender"].startswith("mi_kernels")]
    assert ours
    for row in found["rows"]:
        assert "error" not in row, row
        assert math.isfinite(row["tflops"])


def test_the_full_list_has_the_rows_that_are_promised():
    listed = {(c.group, c.name) for c in cases()}
    for batch in (256, 32768, 131072, 262144):
        assert ("InfoNCE one-sided", f"B={batch}") in listed and ("InfoNCE symmetric", f"B={batch}") in listed
    assert {("SigLIP", "B=65536"), ("concat critic", "B=4096 G=1"), ("concat critic", "B=256 G=6")} <= listed
    assert {c.group for c in cases()} >= {"CLUB", "MMD"}
    assert sum(c.seconds for c in cases()) < 300


def test_the_exact_answers_are_those_of_the_plain_formula():
    for case in cases(quick=True):
        problem = case.make(CPU)
        value, gradients = problem.exact()
        plain = next(f for n, f in problem.contenders.items() if "eager" in n)
        if problem.leaves[0].dtype == torch.float32:
            got, found = answer(plain, problem.leaves)
            assert float(got) == pytest.approx(float(value), rel=1e-5)
            for a, b in zip(found, gradients, strict=True):
                assert (a.double() - b.double()).norm() <= 1e-4 * b.double().norm()


def test_summary_is_median_and_quartiles():
    assert summary([0.004, 0.001, 0.002, 0.003]) == {"milliseconds": 2.5, "quartiles": [2.0, 4.0], "runs": 4}
    assert len(CpuTimer().times(lambda: None, 0.0)) == 3


def test_a_command_that_hangs_is_stopped_and_keeps_its_output():
    found = stages.command([sys.executable, "-c", "print('so far', flush=True); import time; time.sleep(60)"], 3.0)
    assert found["timed_out"] and found["rc"] != 0 and found["seconds"] < 30
    assert "so far" in found["output"]


def test_every_ended_job_of_the_tests_is_saved_and_all_share_one_deadline(monkeypatch):
    left = []

    def command(arguments, seconds):
        left.append(seconds)
        time.sleep(0.05)
        return {"output": "== 3 passed in 1.0s ==", "rc": 0, "timed_out": False, "seconds": 0.05}

    monkeypatch.setattr(stages, "command", lambda arguments, seconds, **where: command(arguments, seconds))
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 2)  # one job at a time
    saved = []
    found = stages.tests(CPU, 10.0, True, lambda part: saved.append(list(part)))
    assert len(found) > 1 and all(row["counts"] == {"passed": 3} for row in found.values())
    assert [len(names) for names in saved] == list(range(1, len(found) + 1))
    assert left[-1] < left[0] - 0.04 * (len(found) - 1)


def test_a_report_is_replaced_in_one_step(tmp_path):
    runner.report(tmp_path, {"a": 1})
    with pytest.raises(TypeError):
        runner.report(tmp_path, {"a": object()})
    assert runner.earlier(tmp_path) == {"a": 1}


def test_a_device_that_fails_within_a_case_leaves_the_rows_before_it():
    """After a kernel fault every later call on a CUDA device fails too; earlier rows are kept."""

    class Broken(FakeTimer):
        def __init__(self):
            self.runs = 0

        def times(self, step, seconds):
            self.runs += 1
            if self.runs > 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().times(step, seconds)

    def make(device):
        problem = square(device)
        problem.contenders = {name: problem.contenders["good"] for name in ("first", "second", "third")}
        return problem

    parts = []
    timer = Broken()
    case = Case("g", "n", {"dtype": "float32"}, make)
    found = run.run(case, CPU, timer, BEST, on_row=lambda part: parts.append(json.loads(json.dumps(part))))
    assert [len(part["rows"]) for part in parts] == [1, 2, 3]
    assert "milliseconds" in parts[-1]["rows"][0]
    assert all("illegal memory access" in row["error"] for row in found["rows"][1:])


def test_a_case_that_takes_its_process_down_costs_only_itself(monkeypatch):
    calls = []

    def command(arguments, seconds, on_line):
        skip = int(arguments[arguments.index("--skip") + 1])
        calls.append(skip)
        lines = [{"ceilings": {"a": 1}}]
        for i in range(skip, 4):
            lines += [{"started": f"case {i}"}, {"part": {"name": i, "rows": ["the first"]}}]
            if i == 1:
                break
            lines.append({"case": {"name": i, "rows": []}})
        for line in [*(json.dumps(line) for line in lines), '{"cut o']:
            on_line(line)
        return {"output": "", "rc": -11 if "part" in lines[-1] else 0, "timed_out": False}

    monkeypatch.setattr(stages, "command", command)
    saved = []
    found = stages.bench(CPU, 100.0, True, 4, lambda part: saved.append([len(c["rows"]) for c in part["cases"]]))
    # results are saved after every row and every case
    assert saved == [[1], [0], [0, 1], [0, 1, 1], [0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 0]]
    assert calls == [0, 2]
    assert [c["name"] for c in found["cases"]] == [0, 1, 2, 3]
    assert found["cases"][1] == {"name": 1, "rows": ["the first"], "error": "the process ended after these rows"}
    assert [c["case"] for c in found["crashed"]] == ["case 1"]
    assert found["left_out"] == 0 and found["ceilings"] == {"a": 1}


def test_the_runner_writes_its_report_and_a_failing_step_is_recorded(monkeypatch, tmp_path):
    def fail(*arguments):
        raise OSError("no disk")

    monkeypatch.setattr(stages, "bench", fail)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path / "new")]
    assert runner.main([*arguments, "--only", "build,sanitize,bench"]) == 1
    found = json.loads((tmp_path / "new/gpu.json").read_text())
    assert found["bench"] == {"error": "OSError: no disk"}
    assert "skipped" in found["build"] and "skipped" in found["sanitize"]
    assert found["environment"]["torch"] == torch.__version__
    assert runner.main([*arguments, "--only", "build"]) == 0
    assert "bench" in json.loads((tmp_path / "new/gpu.json").read_text())  # from the earlier call
    with pytest.raises(SystemExit):
        runner.main([*arguments, "--only", "lunch"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_runner_says_so(tmp_path, capsys):
    assert runner.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_pytests_counts_are_read_also_where_it_was_stopped():
    assert stages._counts("...\n== 3 passed, 2 skipped in 1.0s ==") == {"passed": 3, "skipped": 2}
    assert stages._counts("a PASSED\nb FAILED\nc PASSED\n")["passed"] == 2


def test_headline_sizes_come_first_and_torch_compile_last():
    listed = plan()
    late = [compiled for _, compiled in listed]
    assert late == sorted(late) and any(late) and not late[0]
    assert listed[0][0].name == "B=32768"
    assert all(case.make.keywords["with_compile"] for case, compiled in listed if compiled)


def test_the_passes_share_the_contenders():
    def make(device):
        problem = square(device)
        problem.contenders = {"good": problem.contenders["good"], "torch.compile": problem.contenders["good"]}
        return problem

    rows = [run.run(Case("g", "n", {}, make), CPU, FakeTimer(), BEST, late)["rows"] for late in (False, True)]
    assert [[r["contender"] for r in found] for found in rows] == [["good"], ["torch.compile"]]


def test_a_build_without_its_extension_is_an_error(monkeypatch):
    """setup.py exits with status 0 even if the build fails, so the runner must check the extension."""
    ran = []

    def command(arguments, seconds, on_line=None, **environment):
        ran.append(arguments)
        failed = "-c" in arguments
        output = "the compiled extension was built without CUDA" if failed else ""
        return {"rc": int(failed), "timed_out": False, "seconds": 1.0, "output": output}

    monkeypatch.setattr(stages, "command", command)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = stages.build(torch.device("cuda"), 1.0)
    assert "built without CUDA" in found["error"] and len(ran) == 2
    assert runner.complaints("build", found) == [found["error"]]


def test_what_fails_is_counted():
    ended = {"a.py": {"rc": 1}, "b.py": {"rc": 0}, "c.py": {"rc": 5}}
    assert runner.complaints("tests", ended) == ["a.py ended with 1"]
    assert runner.complaints("sanitize", {"memcheck": {"clean": False}, "racecheck": {"clean": True}})
    row = {"contender": "mi_kernels triton", "error": "wrong"}
    case = {"group": "g", "name": "n", "rows": [row, {"contender": "rival", "error": "absent"}]}
    assert runner.complaints("bench", {"cases": [case], "crashed": []}) == ["g n mi_kernels triton: wrong"]


def test_every_concat_case_has_the_public_formulation_of_factorcl():
    for case in cases(quick=True):
        if case.group == "concat critic":
            assert "public FactorCL formulation, eager" in case.make(CPU).contenders
