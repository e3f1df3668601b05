"""Seconds of one whole training step, per backend that runs here."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import mi_kernels as mk
from models.data.dataset import Dataset
from models.registry import build
from models.settings import RunConfig
from models.training.phases import Training, frozen

# The last available one is the default on a CPU.
BACKENDS = ("reference", "chunked", "cpu")


class Seconds(NamedTuple):
    """Median and quartiles of the steps that were measured."""

    median: float
    low: float
    high: float


def step_times(config: RunConfig, data: Dataset, steps: int = 7, limit: float = 6.0) -> dict[str, Seconds]:
    """All phases of one batch, measured in turns in this process; fewer steps when they take longer than ``limit``."""
    model = build(config.name, config.model, data, config.seed)
    module = Training(model, data, config.training)
    batch = module.prepared(data.batch(data.rows("train")[: config.training.batch_size]), module.generator(0))
    optimizers = module.configure_optimizers()

    def step() -> None:
        for phase, optimizer in zip(module.phases, optimizers, strict=True):
            mine = {id(parameter) for parameter in phase.parameters}
            with frozen(p for p in model.parameters() if id(p) not in mine):
                source = module.source(phase, batch)
                for _ in range(phase.steps if source is not None else 0):
                    optimizer.zero_grad()
                    phase.loss(source).total.backward()
                    optimizer.step()

    names = [name for name in BACKENDS if mk.backends()[name] == "available"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(steps + 1):
        for name in names:
            start = time.perf_counter()
            with mk.use_backend(name):
                step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() - begin > limit:
            break
    return {name: _quartiles(values) for name, values in seconds.items()}


def _quartiles(values: list[float]) -> Seconds:
    if len(values) < 2:
        return Seconds(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Seconds(median, low, high)
