"""Builds, tests, sanitizes and times this checkout on a GPU, without installation, network or git.

`python3 -m bench.gpu [--only build,tests] [--only sanitize] [--only bench] [--out runs/gpu] [--device cuda] [--quick]`

Builds the extension in place (with CUDA if there is a toolkit), runs tests/gpu and the kernel test cases on the device,
runs small problems under compute-sanitizer, and times the benchmark, headline sizes first and torch.compile last. Each
of the three forms of --only takes at most five minutes on 16 cores. OUT/gpu.json is written after every step and every
timed case, and keeps the steps of earlier calls. If a step fails, this is recorded, the other steps run, and the exit
status is 1. `--device cpu --quick` tests the runner itself on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.files import replace_file

from . import stages
from .cases import plan

# Seconds that a step may take; the build leaves what it does not need to the tests.
SECONDS = {"build": 170.0, "tests": 120.0, "sanitize": 290.0, "bench": 290.0}
NOTE = (
    "Times are medians of single runs, forward plus backward, with the level-2 cache overwritten before each; tflops "
    "counts the convention of its case, of_matmul_rate divides by this device's matmul in the same run, over_copy_time "
    "divides by the time to move the case's bytes at the copy rate of the same run; peak_mib is what a step adds. "
    "Every contender is checked against an fp32 or fp64 formula first."
)


def report(out: Path, found: dict[str, Any]) -> None:
    replace_file(out / "gpu.json", lambda beside: beside.write_text(json.dumps(found, indent=1) + "\n"))


def earlier(out: Path) -> dict[str, Any]:
    """What steps of earlier calls found."""
    path = out / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else {}


def complaints(step: str, result: dict[str, Any]) -> list[str]:
    """What makes a step a failure, a line each."""
    if "error" in result:
        return [result["error"]]
    if step == "tests":
        bad = [name for name, r in result.items() if r["rc"] not in (0, 5)]  # 5: pytest was left nothing to run
        return [f"{name} ended with {result[name]['rc']}" for name in bad]
    if step == "sanitize":
        return [f"{kind} is not clean" for kind, r in result.items() if isinstance(r, dict) and not r["clean"]]
    rows = [(c, r) for c in result.get("cases", []) for r in c["rows"] if r["contender"].startswith("mi_kernels")]
    wrong = [f"{c['group']} {c['name']} {r['contender']}: {r['error']}" for c, r in rows if "error" in r]
    return wrong + [f"{c['case']} took its process down" for c in result.get("crashed", []) if not c["timed_out"]]


def table(found: dict[str, Any]) -> list[str]:
    """The benchmark as lines of text."""
    lines = []
    for case in found.get("bench", {}).get("cases", []):
        if "error" in case:
            lines.append(f"{case['group']:20s} {case['name']:14s} {case['error']}")
        for row in case["rows"]:
            figure = row.get("error") or (
                f"{row['milliseconds']:12.4f} ms {row['tflops']:9.2f} TFLOP/s  "
                f"{row.get('of_matmul_rate', 0):6.1%} of matmul  {row.get('peak_mib')} MiB"
            )
            lines.append(f"{case['group']:20s} {case['name']:14s} {row['contender']:32s} {figure}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", default=",".join(SECONDS), help="steps, separated by commas")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    steps = arguments.only.split(",")
    if unknown := set(steps) - set(SECONDS):
        parser.error(f"--only must name some of {', '.join(SECONDS)}, got {', '.join(sorted(unknown))}")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device is here; `--device cpu --quick` tries the runner out", file=sys.stderr)
        return 2
    found = {**earlier(arguments.out), "environment": stages.environment(device), "note": NOTE}
    report(arguments.out, found)

    def save(step: str) -> Callable[[dict[str, Any]], None]:
        return lambda part: report(arguments.out, {**found, step: part})

    run = {
        "build": lambda s: stages.build(device, s),
        "tests": lambda s: stages.tests(device, s, arguments.quick, save("tests")),
        "sanitize": lambda s: stages.sanitize(device, s),
        "bench": lambda s: stages.bench(device, s, arguments.quick, len(plan(arguments.quick)), save("bench")),
    }
    saved, failed = 0.0, []
    for name in (s for s in SECONDS if s in steps):
        seconds = SECONDS[name] + (saved if name == "tests" else 0.0)
        print(f"== {name}: at most {seconds:.0f} s", flush=True)
        start = time.perf_counter()
        try:
            found[name] = run[name](seconds)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        saved = max(0.0, seconds - (time.perf_counter() - start))
        report(arguments.out, found)
        failed += [f"{name}: {line}" for line in complaints(name, found[name])]
    print("\n".join(table(found)))
    print(*(f"bench.gpu: FAILED {line}" for line in failed), sep="\n", end="\n" if failed else "")
    print(f"bench.gpu: {arguments.out / 'gpu.json'} written")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
