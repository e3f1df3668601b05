"""Files that survive a kill: written beside, flushed to the disk, then renamed; and read without unpickling anything.

A run's folder holds ``last.ckpt`` (weights, optimisers, progress) and the one before it, ``previous.ckpt``; and
``weights.safetensors``, the weights that are used afterwards. Each name is a whole file at any moment, or none.
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
    """Lightning's way to disk, for its own resuming too: atomic, and with ``weights_only=True`` always."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        replace_file(path, lambda beside: torch.save(checkpoint, beside), path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError for a damaged file that says which one is left to go on from."""
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} does not match its checksum")
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        other = path.with_name(PREVIOUS)
        hint = f"; {other} is the one before it: --resume previous" if path.name == LAST and other.is_file() else ""
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0] or type(error).__name__}){hint}") from error
    return found


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    # Parameters that modules share are one tensor, which safetensors refuses to store twice.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    replace_file(path, lambda beside: save_file(tensors, beside))


def load_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; run fit first")
    try:
        return load_file(path)
    except SafetensorError as error:
        hint = "; fit with --resume writes it again from the checkpoint" if (path.parent / LAST).is_file() else ""
        raise ValueError(f"{path} is damaged: {error}{hint}") from error


def misfit(path: Path, error: RuntimeError) -> ValueError:
    """For a state that is another model's: torch's message lists every key, the first line of it is enough."""
    first = (str(error).splitlines() or [""])[-1].strip().split(", ")[0].rstrip(". ")
    return ValueError(f"{path} does not fit the settings beside it, it is another model's ({first})")


def damaged(path: Path) -> bool:
    """Whether a file of weights cannot be read."""
    try:
        load_weights(path)
    except ValueError:
        return True
    return False
