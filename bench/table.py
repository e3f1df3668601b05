"""Rows of a benchmark: all contenders and the base are timed in alternation, and times are divided by that of the
base."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from . import machine, peak

COLUMNS = (
    "over_base is a contender's median over the base's in the same run, quartiles beside it; peak_mib is resident "
    "memory that one step adds at its highest; of_fp32_peak is the rate over that of fp32 multiply-adds on registers, "
    "beyond which no fp32 matmul goes"
)


def rows(
    loss: str,
    size: dict[str, Any],
    steps: dict[str, Callable[[], Any]],
    base: str,
    seconds: float,
    *,
    times_base: int = 1,
    base_name: str = "",
    flop: float = 0.0,
    memory: bool = True,
    least: int = 5,
) -> list[dict[str, Any]]:
    """Times `steps` and prints and returns a row for each; the base counts `times_base` times and has a row too unless
    it is only a unit (`base_name` says which, then). `flop` is what the base stands for, for GFLOP/s and their share of
    what multiply-adds on registers reach in fp32; every step is timed `least` times or more often."""
    for run in steps.values():
        run()
    times = machine.interleaved(steps, seconds, least)
    unit = statistics.median(times[base]) * times_base
    most = peak.gflops() if flop else None
    found = []
    for name, run in steps.items():
        if name == base and base_name:
            continue
        median, low, high = machine.quantiles(times[name])
        row = {
            "loss": loss,
            **size,
            "contender": name,
            "milliseconds": round(1e3 * median, 4),
            "base": base_name or base,
            "base_milliseconds": round(1e3 * unit, 4),
            "over_base": round(median / unit, 4),
            "quartiles": [round(low / unit, 4), round(high / unit, 4)],
            "peak_mib": round(machine.peak_mebibytes(run), 1) if memory else None,
            "repetitions": len(times[name]),
        }
        if flop:
            row["gflops"] = round(flop / median / 1e9, 1)
            row["of_fp32_peak"] = peak.share(flop, median, most)
        found.append(row)
        label = " ".join(f"{k}={v}" for k, v in size.items())
        print(
            f"{loss:12s} {label:34s} {name:34s} {1e3 * median:10.3f} ms x{median / unit:7.3f} of {row['base']} "
            f"[{low / unit:.3f}, {high / unit:.3f}] {row['peak_mib'] if memory else 0:8.1f} MiB",
            flush=True,
        )
    return found


def left_out(loss: str, size: dict[str, Any], name: str, error: Exception) -> None:
    """Says which contender has no row, and why."""
    label = " ".join(f"{k}={v}" for k, v in size.items())
    print(f"{loss} {label}: {name} left out: {type(error).__name__}: {str(error)[:90]}", flush=True)
