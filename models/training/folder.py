"""The folder of a run: checks whether a run may start or continue there, and on which data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from models.data.dataset import Dataset
from models.files import replace_file
from models.provenance import describe
from models.settings import FILE, RunConfig, read
from models.training.checkpoint import LAST, PREVIOUS, WEIGHTS

RUN, RESULTS = "run.json", "results.json"
# Settings that may change when a run is resumed.
FREE = ("training.epochs", "training.devices")


def holds_work(out: Path) -> bool:
    """Whether the folder has a checkpoint or weights; a folder with settings alone may be replaced."""
    return any((out / name).is_file() for name in (LAST, PREVIOUS, WEIGHTS))


def refuse_folder(out: Path, *, overwrite: bool = False, resumable: bool = True) -> None:
    """Raises ValueError if a new run in ``out`` would replace an existing one, and FileExistsError if ``out`` is a
    file."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out must be a folder, {out} is a file")
    if holds_work(out) and not overwrite:
        what = "a run: continue with --resume," if resumable else "a run with other settings:"
        raise ValueError(f"{out} holds {what} replace it with --overwrite, or choose another --out")


def checkpoint_of(config: RunConfig, data: Dataset, out: Path, which: str) -> Path | None:
    """The checkpoint from which a run continues, "last" or "previous"; None if it was interrupted before its first
    checkpoint.

    Raises ValueError if settings or data differ from those of the run, and FileNotFoundError if there is no such run.
    """
    changed = [name for name in read(out).differences(config) if name not in FREE]
    if changed:
        raise ValueError(f"cannot resume {out}: these settings differ from the run's: {', '.join(changed)}")
    check_digest(out, data)
    checkpoint = out / (PREVIOUS if which == "previous" else LAST)
    if checkpoint.is_file():
        return checkpoint
    # Interrupted before its first checkpoint: the run starts again and gives the same result.
    left = [name for name in (LAST, PREVIOUS) if (out / name).is_file()]
    if left:
        other = {LAST: "--resume", PREVIOUS: "--resume previous"}[left[0]]
        raise FileNotFoundError(f"cannot resume: no such file: {checkpoint}; {out / left[0]} is there: {other}")
    return None


def start_folder(config: RunConfig, data: Dataset, out: Path) -> None:
    """Removes the files of an earlier run and writes the settings and the digest of the data."""
    for name in ("logs", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (LAST, PREVIOUS, WEIGHTS, RUN, FILE, RESULTS):
        (out / name).unlink(missing_ok=True)
    config.save(out)
    note = {"data": data.name, "digest": data.digest(), "machine": describe()}
    replace_file(out / RUN, lambda beside: _write_json(beside, note))


def check_digest(out: Path, data: Dataset) -> None:
    """Raises ValueError if the data differs from that of the run in ``out``."""
    path = out / RUN
    if not path.is_file():
        return
    try:
        digest = json.loads(path.read_text())["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, it must hold the digest of the data; start a new run") from error
    if digest != data.digest():
        raise ValueError(f"the data {data.name!r} has changed since {out} was trained on it; start a new run")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
