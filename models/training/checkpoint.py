"""Crash-safe checkpoints: written to a temporary file, flushed to disk and renamed; and read without unpickling
anything.

The folder of a run holds ``last.ckpt`` (weights, optimisers, progress), ``previous.ckpt`` (the checkpoint before it)
and ``weights.safetensors`` (the final weights). At any time each file is either complete or absent.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.files import replace_file

LAST, PREVIOUS, WEIGHTS = "last.ckpt", "previous.ckpt", "weights.safetensors"


class AtomicCheckpoints(CheckpointIO):
    """Lightning's checkpoint plugin, also used when it resumes: atomic, and always with ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        replace_file(path, lambda beside: torch.save(checkpoint, beside), path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint. Raises FileNotFoundError, or ValueError for a damaged file that names the checkpoint to use
    instead."""
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} does not match its checksum")
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch raise any exception
        other = path.with_name(PREVIOUS)
        hint = f"; {other} is the one before it: --resume previous" if path.name == LAST and other.is_file() else ""
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0] or type(error).__name__}){hint}") from error
    return found


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    # safetensors does not store shared tensors twice, so shared parameters are cloned.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    replace_file(path, lambda beside: save_file(tensors, beside))


def load_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        remedy = f"training did not finish: python -m models fit --resume --out {path.parent}"
        raise FileNotFoundError(f"no such file: {path}; {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        hint = "; fit with --resume writes it again from the checkpoint" if (path.parent / LAST).is_file() else ""
        raise ValueError(f"{path} is damaged: {error}{hint}") from error


def misfit(path: Path, error: RuntimeError) -> ValueError:
    """The error for the weights of another model. torch's message lists every key; only its first line is used."""
    first = (str(error).splitlines() or [""])[-1].strip().split(", ")[0].rstrip(". ")
    return ValueError(f"{path} does not fit the settings beside it, it is another model's ({first})")


def damaged(path: Path) -> bool:
    """Whether a file of weights cannot be read."""
    try:
        load_weights(path)
    except ValueError:
        return True
    return False
