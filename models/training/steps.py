"""Raises errors for runs that learn nothing: at the start if no batch can be used, at the end if no step was taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from models.batch import Batch
from models.data.corruption import CorruptionConfig, corrupted
from models.data.dataset import Dataset
from models.model import Phase
from models.training.config import TrainingConfig

if TYPE_CHECKING:
    from models.training.phases import Training


def least_rows(processes: int) -> int:
    """The number of rows that a step needs. Losses compare rows of a batch, and every process needs its own row."""
    return max(2, processes)


def check_batches(module: Training, loaders: tuple[Iterable[Batch], Iterable[Batch]], least: int) -> None:
    """Raises ValueError that names the setting to change if no batch of the first epoch has rows that a phase can use.

    loaders: of training and validation rows; the latter are checked only if the validation loss is used. The check
    stops at the first batch that all phases can use, so it usually costs one batch.
    """
    config, data = module.config, module.data
    stepped = [phase for phase in module.phases if phase.steps]
    for phase in _unusable(stepped, loaders[0], least, config.corruption, config.seed):
        said = f"training cannot begin: no batch has {least} rows that phase {phase.name!r} can use"
        raise ValueError(f"{said}; {_cause(phase, loaders[0], data, config, least)}")
    first = module.phases[:1]
    decides = [f"{name}={getattr(config, name)}" for name in ("select", "patience") if _reads_validation(config, name)]
    if decides and _unusable(first, loaders[1], least):
        raise ValueError(
            f"training.{decides[0]} needs a validation loss, but no validation batch has {least} rows that phase "
            f"{first[0].name!r} can use: set training.select=last and training.patience=0, or use more validation rows"
        )


def check_finite(data: Dataset) -> None:
    """Raises ValueError that names a modality with values that are not finite in a row that has it, and that row."""
    for modality in data.modalities:
        if modality.is_tokens or bool(modality.values.isfinite().all()):
            continue
        rows = modality.rows_of_frames()
        bad = ~modality.values.isfinite().all(1) & modality.has()[rows]
        if bool(bad.any()):
            first, kind = int(rows[bad][0]), "NaN" if bool(modality.values[bad].isnan().any()) else "infinite"
            raise ValueError(
                f"data {data.name!r}: modality {modality.name!r} holds {kind} values, the first in row {first}, in "
                f"{len(rows[bad].unique())} rows altogether; training needs finite ones"
            )


def _reads_validation(config: TrainingConfig, name: str) -> bool:
    return config.select == "best" if name == "select" else config.patience > 0


def _unusable(
    phases: list[Phase], loader: Iterable[Batch], least: int, corruption: CorruptionConfig | None = None, seed: int = 0
) -> list[Phase]:
    """The phases that have fewer than ``least`` usable rows in a whole epoch."""
    rows = dict.fromkeys((phase.name for phase in phases), 0)
    with torch.random.fork_rng([]):  # because a loader draws a seed whenever it starts
        for batch in loader:
            if corruption is not None:
                batch = corrupted(batch, corruption, seed)
            for phase in phases:
                rows[phase.name] += phase.usable(batch).size
            if all(count >= least for count in rows.values()):
                break
    return [phase for phase in phases if rows[phase.name] < least]


def _cause(phase: Phase, loader: Iterable[Batch], data: Dataset, config: TrainingConfig, least: int) -> str:
    if not _unusable([phase], loader, least):
        return f"lower training.corruption.drop, which is {config.corruption.drop}: the phase needs what it takes away"
    rows = data.rows("train")
    whole = torch.stack([modality.has()[rows] for modality in data.modalities]).all(0)
    labelled = torch.ones_like(whole) if data.labelled is None else data.labelled[rows]
    said = f"of {len(rows)} training rows {int(whole.sum())} have every modality and {int(labelled.sum())} a label"
    change = "data.modalities to those that rows have" if int(whole.sum()) < least else "data.labels to a larger share"
    return f"{said}: set {change}"


def check_steps(phases: Iterable[Phase], optimizers: Iterable[torch.optim.Optimizer], config: TrainingConfig) -> None:
    """Raises ValueError for a phase whose optimiser has never taken a step, including the steps before resuming."""
    for phase, optimizer in zip(phases, optimizers, strict=True):
        if phase.steps and not optimizer.state:
            raise ValueError(
                f"phase {phase.name!r} took no step in {config.epochs} epochs, the model is untrained: every batch of "
                f"training.batch_size={config.batch_size} rows had too few that the phase can use, or gave no finite "
                "gradient; raise training.batch_size or data.labels, or lower training.corruption.drop"
            )
