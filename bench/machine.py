"""Describes the machine (processor, cores, versions, commit), and measures times and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mi_kernels.backends import extension_status
from models.files import replace_file
from models.provenance import describe

from . import peak

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Times of all functions, measured in alternation, so that slow phases of the machine affect all of them.

    Functions that take over 20 times as long as the fastest are measured `least` times after the others; otherwise they
    would use most of the time and displace the caches of the others.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}

    def turn(name: str) -> float:
        start = time.perf_counter()
        functions[name]()
        return time.perf_counter() - start

    first = {name: turn(name) for name in functions}
    slow = [name for name in functions if first[name] > 20 * min(first.values())]
    quick = [name for name in functions if name not in slow]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[quick[0]]) < least:
        for name in quick:
            times[name].append(turn(name))
        if len(times[quick[0]]) >= 400:
            break
    for name in slow:
        times[name] = [turn(name) for _ in range(least)]
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return at(0.5), at(0.25), at(0.75)


def _resident() -> int:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_mebibytes(function: Callable[[], Any]) -> float:
    """Additional resident memory of a call at its peak, sampled every half millisecond.

    Memory kept from earlier calls is returned to the system first; otherwise a warm call would seem to need none.
    """
    gc.collect()
    if extension_status() == "available":
        torch.ops.mi_kernels_cpu.release_buffers()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    base, top, stop = _resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            top[0] = max(top[0], _resident())
            time.sleep(5e-4)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function()
    finally:
        stop.set()
        thread.join()
    return max(0, top[0] - base) / 2**20


def save(path: Path, content: Any) -> None:
    """Replaces a JSON file in one step: a run that is killed while it writes loses nothing that was there."""
    replace_file(path, lambda beside: beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n"))


def described() -> dict[str, Any]:
    """The machine, versions and commit, with the peak fp32 rate."""
    return {**describe(), "fp32_peak_gflops": peak.gflops()}


def write(name: str, rows: list[dict[str, Any]], note: str) -> Path:
    """bench/results/NAME.json: the machine, a note on what the columns mean, and the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    save(path, {"machine": described(), "note": note, "rows": rows})
    return path
