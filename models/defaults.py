"""Settings that a data source starts from, and those that a search may try on it.

Everything that is not searched, the number of epochs included, is the same for every model.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from models.runs import RunConfig

DEFAULTS = {
    "digits": RunConfig(
        data="digits",
        epochs=20,
        batch_size=64,
        lr=5e-4,
        hidden=256,
        feature_dim=64,
        encoder_layers=1,
        critic_hidden=128,
    ),
    "synthetic": RunConfig(
        data="synthetic",
        epochs=10,
        batch_size=64,
        lr=5e-4,
        hidden=256,
        feature_dim=64,
        encoder_layers=1,
        critic_hidden=128,
    ),
    "utd-mhad": RunConfig(
        data="utd-mhad",
        epochs=30,
        batch_size=64,
        lr=1e-3,
        hidden=64,
        feature_dim=64,
        stride=4,
        critic_hidden=128,
        head_layers=0,
    ),
}

VECTORS: dict[str, tuple[Any, ...]] = {
    "lr": (2e-4, 5e-4, 1e-3, 2e-3),
    "temperature": (0.05, 0.1, 0.3, 0.5),
    "inner_steps": (1, 3),
    "augmentation": ("unique", "independent"),
}
SEQUENCES: dict[str, tuple[Any, ...]] = {
    "lr": (3e-4, 1e-3, 3e-3),
    "feature_dim": (64, 128),
    "head_layers": (0, 1),
    "dropout": (0.0, 0.3, 0.6),
    "weight_decay": (0.0, 0.01),
    "input_noise": (0.0, 0.1, 0.3),
    "temperature": (0.05, 0.1, 0.3),
    "inner_steps": (1, 3),
    "augmentation": ("unique", "independent"),
}
SPACES = {"utd-mhad": SEQUENCES}


def defaults(data: str) -> RunConfig:
    """Where a data source starts; RunConfig's own defaults for a user's file."""
    return DEFAULTS.get(data) or replace(RunConfig(), data=data)


def trials(data: str, number: int) -> list[dict[str, Any]]:
    """The settings that a search tries, the same ones for every model: the defaults, then ``number - 1`` draws.

    Every so many draws as a setting has values, each of them is drawn once (a Latin hypercube). Raises ValueError when
    number < 1.
    """
    if number < 1:
        raise ValueError(f"the number of trials must be at least 1, got {number}")
    rng = random.Random(0)
    columns = {
        name: [value for _ in range(0, number, len(values)) for value in rng.sample(values, len(values))]
        for name, values in SPACES.get(data, VECTORS).items()
    }
    return [{}, *({name: column[i] for name, column in columns.items()} for i in range(number - 1))]
