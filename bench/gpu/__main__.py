"""Everything that a GPU has to say about this checkout, in one command of under eight minutes.

`python -m bench.gpu --out FOLDER [--device cuda] [--quick] [--seconds 460] [--only build,tests,sanitizer,bench]`

Builds the extension (with CUDA where a toolkit is), runs tests/gpu and the kernels' cases on the device, watches small
problems under compute-sanitizer, and times the benchmark; writes FOLDER/gpu.json after every step. A step that fails is
recorded and the rest runs. `--device cpu --quick` tries the runner itself out on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import stages
from .cases import cases

# Shares of the time that a step may take; what it leaves goes to the steps behind it.
SHARES = {"build": 0.3, "tests": 0.35, "sanitizer": 0.25, "bench": 1.0}
NOTE = (
    "Times are medians of single runs, forward plus backward, with the level-2 cache overwritten before each; tflops "
    "counts the convention of its case, of_matmul_rate divides by this device's matmul in the same run, over_copy_time "
    "divides by the time to move the case's bytes at the copy rate of the same run; peak_mib is what a step adds. "
    "Every contender is checked against an fp32 or fp64 formula first."
)


def report(out: Path, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=460.0)
    parser.add_argument("--only", default=",".join(SHARES), help="steps, separated by commas")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    steps = arguments.only.split(",")
    if unknown := set(steps) - set(SHARES):
        parser.error(f"--only must name some of {', '.join(SHARES)}, got {', '.join(sorted(unknown))}")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device is here; `--device cpu --quick` tries the runner out", file=sys.stderr)
        return 2
    end = time.perf_counter() + arguments.seconds
    found: dict[str, Any] = {"environment": stages.environment(device), "note": NOTE}
    report(arguments.out, found)
    run = {
        "build": lambda s: stages.build(device, s),
        "tests": lambda s: stages.tests(device, s, arguments.quick),
        "sanitizer": lambda s: stages.sanitizer(device, s),
        "bench": lambda s: stages.bench(device, s, arguments.quick, len(cases(arguments.quick))),
    }
    for name in (s for s in SHARES if s in steps):
        left = end - time.perf_counter()
        print(f"== {name}: at most {left * SHARES[name]:.0f} s", flush=True)
        try:
            found[name] = run[name](left * SHARES[name])
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        report(arguments.out, found)
    print("\n".join(table(found)))
    print(f"bench.gpu: {arguments.out / 'gpu.json'} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
