"""What a result must be read with: processor, cores, threads, versions, commit and day."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    info = {k.strip(): v.strip() for k, v in fields.items()}
    return f"{info.get('model name', platform.machine())} (family {info.get('cpu family')}, model {info.get('model')})"


RESULTS = "bench/results"


def commit(root: Path = Path(__file__).parent.parent) -> str:
    """Short hash of the checkout at `root`, with "+changes" where tracked files differ; empty without git.

    Files of bench/results do not count: one command writes several of them, and no figure depends on the others.
    """
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    listed = ["git", "status", "--porcelain", "-uno", "--", ".", f":(exclude){RESULTS}"]
    dirty = subprocess.run(listed, cwd=root, capture_output=True, text=True)
    return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def describe() -> dict[str, Any]:
    """Never a host name or a path."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }
