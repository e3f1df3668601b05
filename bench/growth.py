"""Measures how time and memory grow: exponents in B, N, D, H and T, from the slopes between doubled sizes.

`python -m bench run growth [--quick]` writes bench/results/cpu_growth.json. A step is forward and backward; the sizes
of a row are timed in alternation. `exponent` is the slope of log time over log size in the upper half of the sizes,
where fixed costs no longer matter. `exponent_of_memory` is that of the additional peak memory of a step, or null below
1 MiB.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

from . import machine
from .suite import Step, _backward, _leaves

NOTE = __doc__.split("\n\n")[1].replace("\n", " ")


def info_nce(batch: int = 2048, width: int = 128) -> Step:
    return _backward(mk.info_nce, _leaves((batch, width), (batch, width)))


def bank(candidates: int) -> Step:
    x, y = _leaves((256, 128), (256, 128))
    (negatives,) = _leaves((candidates, 128), seed=1)
    return _backward(lambda a, b: mk.info_nce(a, b, negatives.detach()), [x, y])


def concat(batch: int = 128, hidden: int = 256) -> Step:
    torch.manual_seed(0)
    bound = mk.InfoNCE(mk.ConcatCritic(64, 64, (hidden, hidden)))
    return _backward(bound, _leaves((batch, 64), (batch, 64)), bound)


def club(batch: int = 4096, width: int = 128) -> Step:
    return _backward(lambda mu, logvar, y: gaussian_club(mu, logvar, y), _leaves(*((batch, width),) * 3))


def mmd(batch: int = 1024, width: int = 64) -> Step:
    return _backward(mk.mmd, _leaves((batch, width), (batch, width)))


def attention(steps: int, normalizer: str = "softmax") -> Step:
    return _backward(partial(mk.cross_attention, normalizer=normalizer), _leaves(*((4, 8, steps, 8),) * 3))


def lstm(steps: int = 100, hidden: int = 64) -> Step:
    def run(x: Tensor, a: Tensor, b: Tensor) -> Any:
        return mk.lstm(x, a / hidden**0.5, b / hidden**0.5)

    return _backward(run, _leaves((32, steps, hidden), (4 * hidden, hidden), (4 * hidden, hidden)))


# name, dimension, what prepares a step of a size, the smallest size, how often it is doubled
CASES: tuple[tuple[str, str, Callable[[int], Step], int, int], ...] = (
    ("info_nce", "B", lambda n: info_nce(batch=n), 512, 5),
    ("info_nce", "D", lambda n: info_nce(width=n), 64, 4),
    ("info_nce, shared negatives", "N", bank, 4096, 4),
    ("InfoNCE, concat critic", "B", lambda n: concat(batch=n), 32, 4),
    ("InfoNCE, concat critic", "H", lambda n: concat(hidden=n), 64, 3),
    ("gaussian_club", "B", lambda n: club(batch=n), 1024, 5),
    ("gaussian_club", "D", lambda n: club(width=n), 64, 4),
    ("mmd", "B", lambda n: mmd(batch=n), 256, 4),
    ("cross_attention", "T", attention, 128, 4),
    ("cross_attention, sparsemax", "T", lambda n: attention(n, "sparsemax"), 128, 4),
    ("lstm", "T", lambda n: lstm(steps=n), 25, 4),
    ("lstm", "H", lambda n: lstm(hidden=n), 32, 3),
)


def slope(sizes: list[int], values: list[float]) -> float:
    """Of log values on log sizes, least squares over the upper half (three sizes or more)."""
    first = max(0, min(len(sizes) // 2, len(sizes) - 3))
    xs, ys = ([math.log(v) for v in found[first:]] for found in (sizes, values))
    return statistics.linear_regression(xs, ys).slope


def measure(name: str, dimension: str, make: Callable[[int], Step], sizes: list[int], seconds: float) -> dict[str, Any]:
    steps = {str(n): make(n) for n in sizes}
    for step in steps.values():
        step()
    times = machine.interleaved(steps, seconds, least=3)
    medians = [statistics.median(times[str(n)]) for n in sizes]
    peaks = [machine.peak_mebibytes(step) for step in steps.values()]
    row = {
        "case": name,
        "dimension": dimension,
        "sizes": sizes,
        "milliseconds": [round(1e3 * t, 4) for t in medians],
        "peak_mib": [round(p, 1) for p in peaks],
        "exponent": round(slope(sizes, medians), 3),
        "exponent_of_memory": round(slope(sizes, peaks), 3) if min(peaks[-3:]) >= 1 else None,
    }
    print(f"{name:28s} {dimension}  time {row['exponent']:6.2f}  memory {row['exponent_of_memory']}", flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--seconds", type=float, default=8.0, help="per row")
    options = parser.parse_args(arguments)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    rows = []
    for name, dimension, make, least, doublings in CASES:
        first, count = (least // 16, 3) if options.quick else (least, doublings + 1)
        sizes = [first * 2**k for k in range(count)]
        rows.append(measure(name, dimension, make, sizes, 0.1 if options.quick else options.seconds))
    if not options.quick:
        machine.write("cpu_growth", rows, NOTE)
    print("bench.growth: done")


if __name__ == "__main__":
    main()
