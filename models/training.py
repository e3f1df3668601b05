"""Training on Lightning: a theta step on the model's loss, then k phi steps on its CLUB critics."""

from __future__ import annotations

import csv
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from models.data import Batch, Inputs, PairedData
from models.data.augmentations import Augmentation, noisy
from models.runs import Model, RunConfig, build

CHECKPOINT = "last.ckpt"


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for these parameters inside the block: saves their share of the backward."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Training(LightningModule):
    """Alternating optimisation of any model that has loss, inner_parameters and inner_loss.

    FactorCL's Algorithm 3. The inner steps recompute features after the theta step, of the same batch as the outer one
    or of a fresh one (RunConfig.inner_batch). Noise, dropout, augmentations and fresh batches depend on (seed, number
    of the batch) alone and a checkpoint holds that number, so a resumed run repeats exactly.
    """

    batches_seen: Tensor

    def __init__(self, model: Model, data: PairedData, config: RunConfig):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config, self.data = model, config, data
        self.augment = (Augmentation(data.first), Augmentation(data.second, config.augmentation == "unique"))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        phi = list(self.model.inner_parameters())
        inner = {id(parameter) for parameter in phi}
        theta = [parameter for parameter in self.model.parameters() if id(parameter) not in inner]
        groups = [theta, phi] if phi else [theta]
        # Without weight decay this is Adam.
        return [torch.optim.AdamW(group, lr=self.config.lr, weight_decay=self.config.weight_decay) for group in groups]

    def generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + draw)

    def noisy(self, batch: Batch, generator: torch.Generator) -> Batch:
        scale = self.config.input_noise
        if scale == 0:
            return batch
        return Batch(noisy(batch.x1, scale, generator), noisy(batch.x2, scale, generator), batch.y)

    def fresh(self, generator: torch.Generator) -> tuple[Batch, list[tuple[Inputs, Inputs]]]:
        """A batch of training rows, drawn without replacement, and its views."""
        rows = self.data.rows("train")
        rows = rows[torch.randperm(len(rows), generator=generator)[: self.config.batch_size]]
        batch = self.noisy(self.data.batch(rows), generator)
        return batch, self.views(batch, generator)

    def views(self, batch: Batch, generator: torch.Generator) -> list[tuple[Inputs, Inputs]]:
        return [
            (self.augment[0](batch.x1, generator), self.augment[1](batch.x2, generator))
            for _ in range(self.model.views)
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers = self.optimizers()
        theta, *inner = optimizers if isinstance(optimizers, list) else [optimizers]
        generator = self.generator(int(self.batches_seen))
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # for dropout
        batch = self.noisy(batch, generator)
        views = self.views(batch, generator)
        theta.zero_grad()
        with frozen(self.model.inner_parameters()):
            loss, terms = self.model.loss(batch, views)
            self.manual_backward(loss)
        theta.step()
        for phi in inner:
            for _ in range(self.config.inner_steps):
                if self.config.inner_batch == "fresh":
                    batch, views = self.fresh(generator)
                phi.zero_grad()
                self.manual_backward(self.model.inner_loss(batch, views))
                phi.step()
        self.batches_seen += 1
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss became {loss.item()} in epoch {self.current_epoch}: lower --lr")
        self.log("loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.y))
        self.log_dict(
            {f"term/{name}": value for name, value in terms.items()},
            on_step=False,
            on_epoch=True,
            batch_size=len(batch.y),
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, _ = self.model.loss(batch, self.views(batch, self.generator(-1 - batch_idx)))
        self.log("valid_loss", loss, prog_bar=True, batch_size=len(batch.y))


def fit(
    config: RunConfig,
    data: PairedData,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Iterable[Callback] = (),
) -> Training:
    """Trains and leaves config.json, last.ckpt, logs/ (CSV) and tensorboard/ in ``out``.

    ``resume`` goes on from last.ckpt, with the same settings but for ``epochs``.
    Raises ValueError when the settings differ from those of the run that is resumed.
    """
    checkpoint = out / CHECKPOINT
    if resume:
        changed = RunConfig.read(out).differences(config)
        if changed:
            raise ValueError(f"cannot resume {out}: these settings differ from the run's: {', '.join(changed)}")
        if not checkpoint.is_file():
            raise FileNotFoundError(f"cannot resume: no such file: {checkpoint}")
    elif (out / "config.json").is_file():
        _clear(out)
    config.save(out)
    module = Training(build(config, data), data, config)
    loaders = (
        data.loader("train", config.batch_size, seed=config.seed),
        data.loader("valid", config.batch_size),
    )
    with quiet():
        trainer = Trainer(**_trainer_options(config, out, progress, callbacks))
        trainer.fit(module, *loaders, ckpt_path=str(checkpoint) if resume else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return module


def _clear(out: Path) -> None:
    """Removes the logs and the checkpoint of an earlier run in this folder."""
    for name in ("logs", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / CHECKPOINT).unlink(missing_ok=True)


def _trainer_options(config: RunConfig, out: Path, progress: bool, callbacks: Iterable[Callback]) -> dict[str, Any]:
    # A resumed run writes a new version beside the old one: CSVLogger would delete a file that exists.
    loggers = [CSVLogger(out, name="logs"), TensorBoardLogger(out, name="tensorboard")]
    keep = ModelCheckpoint(dirpath=out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    bar: list[Callback] = [TQDMProgressBar(refresh_rate=10, leave=True)] if progress else []
    return {
        "max_epochs": config.epochs,
        # At most about twenty points of the curve: FactorCL's six critics make each one dear.
        "check_val_every_n_epoch": max(1, config.epochs // 20),
        "accelerator": "cpu",
        "devices": 1,
        "logger": loggers,
        "callbacks": [*bar, *callbacks, keep],
        "enable_progress_bar": progress,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }


def load_run(out: Path, data: PairedData) -> Training:
    """The trained model of a run's folder."""
    config = RunConfig.read(out)
    path = out / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; run fit first")
    module = Training(build(config, data), data, config)
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return module.eval()


def history(out: Path, column: str) -> list[tuple[int, float]]:
    """(epoch, value) of a logged column, over every time that the run was resumed."""
    values: dict[int, float] = {}
    for path in sorted(out.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get(column):
                    values[int(row["epoch"])] = float(row[column])
    return sorted(values.items())


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Lightning's hints on workers, devices and checkpoint folders; errors pass."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
