"""Training on one batch: runs the phases of a model in order. Each phase trains its parameters while all others are
frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from models.batch import Batch, Inputs
from models.data.augmentations import Augmentation, noisy
from models.data.corruption import corrupted
from models.data.dataset import Dataset
from models.model import Loss, Model, Phase
from models.shares import average_gradients, sharing
from models.training.config import TrainingConfig
from models.training.steps import check_steps, least_rows


class NotFinite(RuntimeError):
    """A loss became NaN or infinite in training."""


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context without gradients for these parameters, which saves their part of the backward pass."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class Training(LightningModule):
    """Alternating optimisation of any Model.

    Corruption depends only on (seed, epoch, row). Input noise, dropout, views and fresh batches depend only on (seed,
    number of the batch). A checkpoint contains that number, so a resumed run repeats exactly.

    With several processes, all of them make the same batch and share the work on it (models.shares); losses and
    gradients are averaged over them.
    """

    batches_seen: Tensor

    def __init__(self, model: Model, data: Dataset, config: TrainingConfig, total_steps: int | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config, self.data = model, config, data
        config.corruption.check(data)
        unique = config.augmentation == "unique"
        mixing = config.augmentation == "mixing"
        named = enumerate(data.modalities)
        self.augment = {m.name: Augmentation(m, unique and place > 0, mixing) for place, m in named}
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))
        self.phases = model.phases()
        self.total_steps = total_steps

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        # Without weight decay AdamW is Adam. One call for all parameters: on a CPU torch's loop over them takes a tenth
        # of a small model's step. Not under AMP, where Lightning then refuses to clip. On a GPU torch chooses.
        whole = self.config.precision in ("32", "64")
        return [
            torch.optim.AdamW(
                phase.parameters,
                lr=self._lr(phase),
                weight_decay=self._decay(phase),
                fused=(whole and all(parameter.device.type == "cpu" for parameter in phase.parameters)) or None,
            )
            for phase in self.phases
        ]

    def _lr(self, phase: Phase) -> float:
        return self.config.lr if phase.optimizer.lr is None else phase.optimizer.lr

    def _decay(self, phase: Phase) -> float:
        own = phase.optimizer.weight_decay
        return self.config.weight_decay if own is None else own

    def generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + draw)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the batch on the CPU, where noise and views are drawn, so that they are the same for every device."""
        return batch

    def prepared(self, batch: Batch, generator: torch.Generator, *, training: bool = True) -> Batch:
        """The input of the model: the batch after corruption and noise, with views."""
        if training:
            batch = corrupted(batch, self.config.corruption, self.config.seed, self.current_epoch)
            scale = self.config.input_noise
            if scale:
                batch = batch._replace(inputs={n: noisy(x, scale, generator) for n, x in batch.inputs.items()})
        return batch._replace(views=self.views(batch, generator)).to(self.device)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Mapping[str, Inputs], ...]:
        return tuple(
            {name: self.augment[name](x, generator) for name, x in batch.inputs.items()}
            for _ in range(self.model.views)
        )

    def fresh(self, generator: torch.Generator) -> Batch:
        """A prepared batch of training rows, drawn without replacement."""
        rows = self.data.rows("train")
        rows = rows[torch.randperm(len(rows), generator=generator)[: self.config.batch_size]]
        return self.prepared(self.data.batch(rows), generator)

    @property
    def processes(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        with sharing(self.global_rank, self.processes):
            self._training_step(batch)

    def _training_step(self, batch: Batch) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        generator = self.generator(int(self.batches_seen))
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # for dropout
        batch = self.prepared(batch, generator)
        self.model.progress = min(1.0, int(self.batches_seen) / self.total_steps) if self.total_steps else 1.0
        logged: dict[str, Tensor] = {}
        for index, (phase, optimizer) in enumerate(zip(self.phases, optimizers, strict=True)):
            self._schedule(optimizer, phase)
            found = self.run_phase(phase, optimizer, batch, generator)
            if found is not None:
                prefix = "" if index == 0 else f"{phase.name}/"
                logged[f"{prefix}loss"] = found.total.detach()
                logged |= {f"term/{prefix}{name}": value for name, value in found.terms.items()}
        self.batches_seen += 1
        self._check({name: value for name, value in logged.items() if not name.startswith("term/")})
        if "loss" in logged:
            how: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": batch.size}
            how["sync_dist"] = self.processes > 1
            self.log("loss", logged.pop("loss"), prog_bar=True, **how)
            self.log_dict(logged, **how)

    def run_phase(self, phase: Phase, optimizer: Any, batch: Batch, generator: torch.Generator) -> Loss | None:
        """Runs all steps of a phase on one batch. Returns the last loss, or None if the batch has too few usable
        rows."""
        mine = {id(parameter) for parameter in phase.parameters}
        found = None
        with frozen(parameter for parameter in self.model.parameters() if id(parameter) not in mine):
            source = None if phase.fresh else self.source(phase, batch)
            for _ in range(phase.steps):
                if phase.fresh:
                    source = self.source(phase, self.fresh(generator))
                if source is None:
                    continue
                optimizer.zero_grad()
                found = phase.loss(source)
                self.manual_backward(found.total)
                average_gradients(phase.parameters)
                if self.config.clip:
                    self.clip_gradients(optimizer, self.config.clip, "norm")
                optimizer.step()
        return found

    def source(self, phase: Phase, batch: Batch) -> Any:
        """The input of the phase's loss, or None for a batch with fewer usable rows than a step needs."""
        batch = phase.usable(batch)
        if batch.size < least_rows(self.processes):
            return None
        if phase.fixed is None:
            return batch
        with torch.no_grad():
            return phase.fixed(batch)

    def _schedule(self, optimizer: Any, phase: Phase) -> None:
        """Sets the learning rate, which depends only on the number of the batch, so that no state has to be stored."""
        if self.config.schedule == "constant" and not self.config.warmup:
            return
        factor = scheduled(self.config, int(self.batches_seen), self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = self._lr(phase) * factor

    def _check(self, losses: Mapping[str, Tensor]) -> None:
        """Raises NotFinite that names the phase. One test for all losses, because each test synchronises with the
        device."""
        if not losses or bool(torch.stack([loss.isfinite() for loss in losses.values()]).all()):
            return
        name, loss = next((name, loss) for name, loss in losses.items() if not torch.isfinite(loss))
        what = "the loss" if name == "loss" else f"the loss of phase {name.removesuffix('/loss')!r}"
        raise NotFinite(f"{what} became {loss.item()} in epoch {self.current_epoch}: lower training.lr")

    def on_train_end(self) -> None:
        check_steps(self.phases, self.trainer.optimizers, self.config)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        batch = self.prepared(batch, self.generator(-1 - batch_idx), training=False)
        with sharing(self.global_rank, self.processes):
            source = self.source(self.phases[0], batch)
            loss = None if source is None else self.phases[0].loss(source)
        if loss is not None:
            several = self.processes > 1
            self.log("valid_loss", loss.total, prog_bar=True, batch_size=batch.size, sync_dist=several)


def scheduled(config: TrainingConfig, step: int, total: int | None) -> float:
    """The factor of the learning rates at a step: linear warm-up, then the schedule."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant" or not total:
        return 1.0
    done = min(1.0, (step - config.warmup) / max(1, total - config.warmup))
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
