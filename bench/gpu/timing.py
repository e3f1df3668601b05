"""Times and memory of a step on a device. A timer is a class with two methods, so that a test can bring its own."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Step = Callable[[], Any]


class Timer(Protocol):
    def times(self, step: Step, seconds: float) -> list[float]:
        """Seconds of several runs, some `seconds` in all."""

    def peak_bytes(self, step: Step) -> int | None:
        """Device memory that one run adds at its highest; None where it is not known."""


class CudaTimer:
    """Events on the stream around every run, with the level-2 cache overwritten before it."""

    def __init__(self, device: torch.device, least: int = 5, most: int = 100):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self.device, self.least, self.most = device, least, most

    def times(self, step: Step, seconds: float) -> list[float]:
        step()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(self.device)
        runs = int(seconds / max(time.perf_counter() - start, 1e-5))
        pairs = []
        for _ in range(min(self.most, max(self.least, runs))):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            first.record()
            step()
            last.record()
            pairs.append((first, last))
        torch.cuda.synchronize(self.device)
        return [first.elapsed_time(last) / 1e3 for first, last in pairs]

    def peak_bytes(self, step: Step) -> int | None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        base = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - base


class CpuTimer:
    """The wall clock; for trying the runner out without a GPU."""

    def times(self, step: Step, seconds: float) -> list[float]:
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < 3 or (time.perf_counter() < end and len(found) < 100):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return found

    def peak_bytes(self, step: Step) -> int | None:
        return None


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def summary(times: list[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and how many runs there were."""
    ordered = sorted(times)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {
        "milliseconds": round(1e3 * statistics.median(ordered), 5),
        "quartiles": [round(1e3 * at(0.25), 5), round(1e3 * at(0.75), 5)],
        "runs": len(ordered),
    }


def ceilings(timer: Timer, device: torch.device, quick: bool) -> dict[str, Any]:
    """What this device does at best: TFLOP/s of square matmuls, GB/s of a copy (bytes read plus bytes written)."""
    side, length = (256, 1 << 20) if quick else (8192, 1 << 28)
    found: dict[str, Any] = {"matmul_side": side, "copy_bytes": 2 * length}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = statistics.median(timer.times(lambda a=a, b=b: a @ b, 0.02 if quick else 0.5))
        found[f"matmul_tflops_{name}"] = round(2 * side**3 / seconds / 1e12, 3)
    source = torch.empty(length, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = statistics.median(timer.times(lambda: target.copy_(source), 0.02 if quick else 0.3))
    found["copy_gbytes_per_second"] = round(2 * length / seconds / 1e9, 2)
    return found
