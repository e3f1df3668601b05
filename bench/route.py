"""Measures both schedules of one-sided 16-bit losses on this GPU and rewrites the routing rules for it.

`python -m bench.route [--write] [--seconds 0.2]`. For every dtype, batch and width both schedules are checked against
each other and timed in turns; a rule is written for each width, from the batch at which the chunks are faster on. Rules
of other devices stay. Without --write the table is printed and nothing changes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import mi_kernels as mk
from bench.gpu.timing import timer_for
from mi_kernels.ops.common.schedules import SCHEDULES
from mi_kernels.ops.dot_critic import routes
from models.provenance import commit

BATCHES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
WIDTHS = (64, 128, 256, 512, 1024)
DTYPES = ("bfloat16", "float16")
Measure = Callable[[str, int, int, str], float]
Row = dict[str, Any]


def measure_on(device: torch.device, seconds: float) -> Measure:
    """Median seconds of a step of InfoNCE by (dtype, B, D, schedule)."""
    timer = timer_for(device)

    def measure(dtype: str, batch: int, depth: int, schedule: str) -> float:
        kind = {"device": device, "dtype": getattr(torch, dtype)}
        x, y = (torch.randn(batch, depth, **kind).requires_grad_() for _ in range(2))

        def step() -> None:
            torch.autograd.grad(mk.info_nce(x, y, backend="triton"), (x, y))

        os.environ["MI_KERNELS_SCHEDULE"] = schedule
        try:
            return statistics.median(timer.times(step, seconds))
        finally:
            del os.environ["MI_KERNELS_SCHEDULE"]

    return measure


def table(measure: Measure, batches: Iterable[int], widths: Iterable[int]) -> list[Row]:
    rows = []
    for dtype in DTYPES:
        for depth in widths:
            for batch in batches:
                fused, stored = (measure(dtype, batch, depth, s) for s in SCHEDULES)
                rows.append({"dtype": dtype, "B": batch, "D": depth, "fused": fused, "stored": stored})
    return rows


def rules(rows: list[Row], architecture: list[int], source: str) -> list[Row]:
    """For each dtype and width the chunks from the first batch on behind which they always won, else fused. A width
    that was measured speaks for those above the one below it; the widest for all beyond."""
    found = []
    for dtype in sorted({r["dtype"] for r in rows}):
        widths = sorted({r["D"] for r in rows if r["dtype"] == dtype})
        for i, depth in enumerate(widths):
            own = sorted((r for r in rows if r["dtype"] == dtype and r["D"] == depth), key=lambda r: r["B"])
            start = None
            for row in reversed(own):
                if row["stored"] >= row["fused"]:
                    break
                start = row["B"]
            bounds: Row = {"architecture": architecture, "dtype": dtype}
            if i:
                bounds["features_at_least"] = widths[i - 1] + 1
            if i < len(widths) - 1:
                bounds["features_at_most"] = depth
            if start is not None:
                found.append({**bounds, "pairs_at_least": start**2, "schedule": "stored", "source": source})
            found.append({**bounds, "schedule": "fused", "source": source})
    return found


def merged(old: list[Row], new: list[Row], architecture: list[int]) -> list[Row]:
    """The new rules in front, then the old ones of other devices and of all."""
    return [*new, *(rule for rule in old if rule.get("architecture") != architecture)]


def write(path: Path, new: list[Row], architecture: list[int]) -> None:
    found = json.loads(path.read_text())
    found["rules"] = merged(found["rules"], new, architecture)
    path.write_text(json.dumps(found, indent=1) + "\n")
    routes.load(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"rewrite {routes.PATH.name}")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.route: no CUDA device is here: nothing is measured, the rules stay as they are", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    name, architecture = torch.cuda.get_device_name(device), list(torch.cuda.get_device_capability(device))
    rows = table(measure_on(device, arguments.seconds), BATCHES, WIDTHS)
    for row in rows:
        print(f"{row['dtype']} B={row['B']} D={row['D']}: fused {1e3 * row['fused']:.4f} ms, "
              f"stored {1e3 * row['chunked']:.4f} ms")  # fmt: skip
    if arguments.write:
        source = f"measured on one {name}, torch {torch.__version__}, commit {commit()}"
        write(routes.PATH, rules(rows, architecture, source), architecture)
        print(f"bench.route: {routes.PATH.name} rewritten for architecture {architecture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
