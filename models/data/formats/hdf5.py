"""HDF5 files as dictionaries of arrays; the library itself runs in a child process with a time and a memory limit."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats.checks import require_data, unpacked_limit

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SCRIPT = Path(__file__).with_name("hdf5_child.py")
SECONDS, BYTES_PER_SECOND = 60, 2_000_000


def read_files(paths: Sequence[str | Path]) -> list[dict[str, np.ndarray | list[str]]]:
    """Every dataset of every file by its full name ("group/name"): arrays of numbers, or lists of strings.

    Raises FileNotFoundError; ImportError without h5py; ValueError that names the file for damage, links to other files,
    datasets that are no numbers or strings, and files on which the HDF5 library crashes, hangs or runs out of memory.
    """
    files = [require_data(path) for path in paths]
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(len(SIGNATURE))
        if head != SIGNATURE:
            raise ValueError(f"{file} is not an HDF5 file")
    if importlib.util.find_spec("h5py") is None:
        raise ImportError(f"{files[0]} is an HDF5 file: install h5py to read it")
    size = sum(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "arrays"
        listing = _run(files, out, unpacked_limit(size), SECONDS + size / BYTES_PER_SECOND)
        with out.open("rb") as stream:
            return [{item["name"]: _next(item, stream) for item in names} for names in listing]


def _next(item: dict[str, Any], stream: Any) -> np.ndarray | list[str]:
    return item["text"] if "text" in item else np.lib.format.read_array(stream, allow_pickle=False)


def _run(files: list[Path], out: Path, limit: int, seconds: float) -> list[list[dict[str, Any]]]:
    command = [sys.executable, "-P", str(SCRIPT), str(out), str(limit), *map(str, files)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False, text=True)
    except subprocess.TimeoutExpired as error:
        name = _last_file(error.stdout, files)
        raise ValueError(f"{name} is damaged: the HDF5 library did not finish in {seconds:.0f} s") from None
    try:
        last = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = None
    if isinstance(last, dict) and "error" in last:
        raise ValueError(f"{last['file']} is no file that can be read: {last['error']}")
    if done.returncode or not isinstance(last, list):
        name = _last_file(done.stdout, files)
        raise ValueError(f"{name} is damaged: the HDF5 library failed on it (exit status {done.returncode})")
    return last


def _last_file(output: str | bytes | None, files: list[Path]) -> str:
    text = output.decode() if isinstance(output, bytes) else output or ""
    begun = [line for line in text.splitlines() if line.startswith('{"file"')]
    return json.loads(begun[-1])["file"] if begun else str(files[0])
