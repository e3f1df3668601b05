"""Trains seeds and grids of settings in parallel: one folder and one process per run. An interrupted sweep can be
resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.settings import RunConfig, dump, read
from models.training.checkpoint import LAST
from models.training.folder import FREE, RESULTS, refuse_folder
from models.training.search import grid

ROOT = Path(__file__).resolve().parents[2]  # holds the package ``models``


class Job(NamedTuple):
    folder: Path
    config: RunConfig


def jobs(base: RunConfig, axes: Mapping[str, Sequence[Any]], seeds: Sequence[int], out: Path) -> list[Job]:
    """The runs in folders OUT/lr=0.001,epochs=3/seed0, or OUT/seed0 without axes."""
    found = []
    for changes, config in grid(base, axes):
        name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in changes.items()).replace("/", "_")
        for seed in seeds:
            folder = out / name / f"seed{seed}" if name else out / f"seed{seed}"
            found.append(Job(folder, config.changed({"training.seed": seed})))
    repeated = [name for name, values in axes.items() if len({str(value) for value in values}) < len(values)]
    if repeated:
        raise ValueError(f"the grid has a value of {repeated[0]} twice: {', '.join(map(str, axes[repeated[0]]))}")
    if len({job.folder for job in found}) < len(found):
        raise ValueError("two settings of the grid have the same last name; sweep them one after the other")
    return found


def finished(job: Job) -> bool:
    """Whether the folder contains results for exactly these settings."""
    return (job.folder / RESULTS).is_file() and not _differences(job)


def _differences(job: Job) -> list[str]:
    try:
        return read(job.folder).differences(job.config)
    except (FileNotFoundError, ValueError):
        return ["unreadable"]


def command(job: Job, config_file: Path) -> list[str]:
    """The command that trains (or resumes from a checkpoint with the same settings) and evaluates."""
    resumable = (job.folder / LAST).is_file() and not [n for n in _differences(job) if n not in FREE]
    found = [sys.executable, "-m", "models", "fit", "--config", str(config_file), "--out", str(job.folder)]
    return [*found, "--evaluate", "--quiet", "--resume" if resumable else "--overwrite"]


def run(todo: Sequence[Job], workers: int, poll: float = 0.2, *, overwrite: bool = False) -> list[str]:
    """Trains all unfinished jobs, ``workers`` at a time. Returns the messages of those that failed.

    The cores are divided between the processes. A failed run does not stop the others. Raises ValueError before
    training if a folder holds a run with other settings and ``overwrite`` is False.
    """
    for job in todo:
        other = [name for name in _differences(job) if name not in FREE]
        if other and other != ["unreadable"]:
            refuse_folder(job.folder, overwrite=overwrite, resumable=False)
    if workers < 1:
        raise ValueError(f"jobs must be at least 1, got {workers}")
    waiting = [job for job in todo if not finished(job)]
    for job in todo:
        if job not in waiting:
            print(f"{job.folder}: kept", flush=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    # So that the runs find the same ``models`` from any working directory.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    running: dict[subprocess.Popen[str], Job] = {}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.yaml"
                    path.write_text(dump(job.config))
                    process = subprocess.Popen(
                        command(job, path),
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                    running[process] = job
                for process in [p for p in running if p.poll() is not None]:
                    job = running.pop(process)
                    errors = process.communicate()[1].strip().splitlines()
                    said = "done" if process.returncode == 0 else (errors or [f"exit status {process.returncode}"])[-1]
                    print(f"{job.folder}: {said}", flush=True)
                    if process.returncode:
                        failures.append(f"{job.folder}: {said}")
                if running:
                    time.sleep(poll)
        finally:
            for process in running:
                process.terminate()
    return failures
