"""The settings that a search tries: the same for every model, as far as it has these settings."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from models.settings import RunConfig, from_dict

VECTORS: dict[str, tuple[Any, ...]] = {
    "training.lr": (2e-4, 5e-4, 1e-3, 2e-3),
    "model.temperature": (0.05, 0.1, 0.3, 0.5),
    "model.inner_steps": (1, 3),
    "training.augmentation": ("unique", "independent"),
}
SEQUENCES: dict[str, tuple[Any, ...]] = {
    "training.lr": (3e-4, 1e-3, 3e-3),
    "model.encoder.out_dim": (64, 128),
    "model.head_layers": (0, 1),
    "model.encoder.dropout": (0.0, 0.3, 0.6),
    "training.weight_decay": (0.0, 0.01),
    "training.input_noise": (0.0, 0.1, 0.3),
    "model.temperature": (0.05, 0.1, 0.3),
    "model.inner_steps": (1, 3),
    "training.augmentation": ("unique", "independent"),
}


def trials(space: Mapping[str, Sequence[Any]], number: int) -> list[dict[str, Any]]:
    """The changes that a search tries: first none, then ``number - 1`` random draws.

    The draws form a Latin hypercube: if a setting has n values, every n consecutive draws contain each value once.
    Raises ValueError if number < 1.
    """
    if number < 1:
        raise ValueError(f"the number of trials must be at least 1, got {number}")
    rng = random.Random(0)
    columns = {
        name: [value for _ in range(0, number, len(values)) for value in rng.sample(values, len(values))]
        for name, values in space.items()
    }
    return [{}, *({name: column[i] for name, column in columns.items()} for i in range(number - 1))]


def applicable(base: RunConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The ``changes`` for which the model has a setting."""
    known = base.flat()
    return {name: value for name, value in changes.items() if name in known}


def grid(base: RunConfig, axes: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], RunConfig]]:
    """Every combination of the axes' values, as changes and as settings. Raises ValueError for unknown settings."""
    found: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        found = [changes | {name: value} for changes in found for value in values]
    return [(changes, from_dict(base.changed(changes).to_dict())) for changes in found]
