"""The arithmetic floor: the matrix products of a step, and the peak fp32 rate of this process (fused multiply-adds on
registers, which no matmul can exceed)."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import mi_kernels as mk

SOURCE = Path(__file__).with_suffix(".cpp")


_highest: dict[int, float] = {}


def gflops(threads: int | None = None) -> float | None:
    """fp32 GFLOP/s of `threads` threads (torch's own number by default), the highest that this process has seen: a
    neighbour on the machine may disturb one measurement. None where there is no C++ compiler."""
    threads = threads or torch.get_num_threads()
    program = _program()
    if program is None:
        return None
    try:
        found = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    _highest[threads] = max(float(found.stdout), _highest.get(threads, 0.0))
    return _highest[threads]


def products(step: Callable[[], Any]) -> float:
    """FLOP of the matrix products of a step whose operators of mi_kernels run on plain torch, whose products torch can
    count."""
    with mk.use_backend("reference"), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def share(flop: float, seconds: float, most: float | None) -> float | None:
    """The part of the peak rate ``most``, in GFLOP/s, that ``flop`` in ``seconds`` reach; None if it is unknown."""
    return None if most is None else round(flop / seconds / 1e9 / most, 3)


@functools.cache
def _program() -> Path | None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    program = Path(folder.name) / "peak"
    flags = ["-O3", "-march=native", "-pthread", "-std=c++17"]
    try:
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return program
