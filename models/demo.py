"""The demo: its models and data, and its folder, in which an earlier demo makes room for the next one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from models.settings import FILE, RunConfig, read, tree_of

DATA = "two-digit-small"
MODELS = ("factorcl-sup", "simclr", "supcon", "cross-self")


def make_room(out: Path, bases: Mapping[str, RunConfig], seeds: Iterable[int]) -> list[Path]:
    """Removes the runs of an earlier demo that have other settings or seeds than this one; returns their folders.

    Runs of the same settings stay, to be kept where nothing has changed since. Whatever else lies in ``out`` stays too:
    runs of other data or models are somebody's work.
    """
    wanted = {
        f"{model}-seed{seed}": base.changed({"training.seed": seed}) for seed in seeds for model, base in bases.items()
    }
    removed = []
    for folder in sorted(path.parent for path in out.glob(f"*/{FILE}")):
        if _of_a_demo(folder) and not _has(folder, wanted.get(folder.name)):
            shutil.rmtree(folder)
            removed.append(folder)
    return removed


def _of_a_demo(folder: Path) -> bool:
    """By name and data alone: the settings may be those of another version."""
    model, _, seed = folder.name.rpartition("-seed")
    try:
        data = tree_of(folder / FILE).get("data")
    except ValueError:
        return False
    return model in MODELS and seed.isdecimal() and isinstance(data, Mapping) and data.get("name") == DATA


def _has(folder: Path, config: RunConfig | None) -> bool:
    try:
        return config is not None and not read(folder).differences(config)
    except ValueError:
        return False
