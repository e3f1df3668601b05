"""The rate that no fp32 matmul of this process can exceed, measured: fused multiply-adds on registers alone."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def gflops(threads: int | None = None) -> float | None:
    """fp32 GFLOP/s of `threads` threads (torch's own number by default); None where there is no C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        try:
            subprocess.run(
                [compiler, "-O3", "-march=native", "-pthread", "-std=c++17", str(SOURCE), "-o", program],
                check=True,
                capture_output=True,
            )
            found = subprocess.run(
                [program, str(threads or torch.get_num_threads())], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
    return float(found.stdout)
