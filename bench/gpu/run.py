"""Runs one case: the exact answer, a check of every contender, then its times and memory. Nothing here raises.

`python -m bench.gpu.run --device D [--quick] --skip N` runs the cases behind the first N and prints JSON lines after
every row and every case: a contender which takes the process down costs itself and those behind it in its case alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .cases import plan
from .problem import Answer, Case, Loss, Problem, answer, wrong
from .problems import COMPILED, Graphed
from .timing import Timer, ceilings, summary, timer_for


def _step(loss: Loss, problem: Problem) -> Callable[[], Any]:
    return loss.step if isinstance(loss, Graphed) else lambda: answer(loss, problem.leaves)


def _check(loss: Loss, problem: Problem, want: Answer) -> str | None:
    if not isinstance(loss, Graphed):
        return wrong(loss, problem, want)
    loss.step()
    loss.step()
    replayed = replace(problem, contenders={})
    return wrong(lambda: _Replay.apply(loss, *problem.leaves), replayed, want)


class _Replay(torch.autograd.Function):
    """What a graph wrote, in the form in which a loss is checked."""

    @staticmethod
    def forward(ctx, graphed, *leaves):
        ctx.gradients = graphed.gradients
        return graphed.value.clone()

    @staticmethod
    def backward(ctx, g):
        return None, *(t * g.to(t.dtype) for t in ctx.gradients)


def contender(name: str, loss: Loss, problem: Problem, want: Answer, timer: Timer, seconds: float) -> dict[str, Any]:
    """A row; `error` says why it has no time."""
    row: dict[str, Any] = {"contender": name}
    try:
        reason = _check(loss, problem, want)
        if reason is not None:
            return {**row, "error": f"wrong, no time is taken: {reason}"}
        step = _step(loss, problem)
        row |= summary(timer.times(step, seconds))
        peak = timer.peak_bytes(step)
        row["peak_mib"] = None if peak is None else round(peak / 2**20, 2)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    return row


def with_ratios(row: dict[str, Any], problem: Problem, best: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Achieved TFLOP/s and GB/s by the conventions, and their share of what the device does at best."""
    if "error" in row:
        return row
    seconds = row["milliseconds"] / 1e3
    row["tflops"] = round(problem.flop / seconds / 1e12, 4)
    rate = best.get(f"matmul_tflops_{dtype}")
    if rate:
        row["of_matmul_rate"] = round(row["tflops"] / rate, 4)
    if problem.moved_bytes and best.get("copy_gbytes_per_second"):
        floor = problem.moved_bytes / (best["copy_gbytes_per_second"] * 1e9)
        row["over_copy_time"] = round(seconds / floor, 3)
    return row


def run(
    case: Case,
    device: torch.device,
    timer: Timer,
    best: dict[str, Any],
    compiled: bool | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Rows of one case, within its budget: a contender whose turn comes too late is left out and says so. `compiled`:
    torch.compile alone, or (False) all the others. `on_row` gets what was found so far after every row."""
    found: dict[str, Any] = {"group": case.group, "name": case.name, **case.size, "rows": []}
    start = time.perf_counter()
    try:
        problem = case.make(device)
        want = problem.exact()
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    found |= {"convention": problem.convention, "bytes": problem.moved_bytes, "absent": problem.absent}
    if compiled is not None:
        problem.contenders = {n: c for n, c in problem.contenders.items() if (n == COMPILED) == compiled}
    share = case.seconds / max(1, len(problem.contenders)) / 2
    for name, loss in problem.contenders.items():
        if time.perf_counter() - start > 3 * case.seconds:
            problem.absent[name] = "the case's time was spent"
            continue
        row = contender(name, loss, problem, want, timer, share)
        found["rows"].append(with_ratios(row, problem, best, str(case.size.get("dtype"))))
        on_row(found)
    found["seconds"] = round(time.perf_counter() - start, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--skip", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    timer = timer_for(device)
    best = ceilings(timer, device, arguments.quick)
    print(json.dumps({"ceilings": best}), flush=True)
    for case, compiled in plan(arguments.quick)[arguments.skip :]:
        print(json.dumps({"started": f"{case.group} {case.name}"}), flush=True)
        found = run(case, device, timer, best, compiled, lambda part: print(json.dumps({"part": part}), flush=True))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps({"case": found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
