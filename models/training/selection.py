"""Selection of weights and early stopping, based only on the validation loss."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from models.training.checkpoint import WEIGHTS, damaged, save_weights
from models.training.config import TrainingConfig

_log = logging.getLogger(__name__)


class Selection(Callback):
    """Writes weights.safetensors: those of the last epoch, or of the lowest validation loss (the first of equal ones).

    The file is written before the checkpoint of its epoch. A run that is interrupted in between repeats the epoch and
    writes the same file again.
    """

    def __init__(self, config: TrainingConfig, out: Path):
        self.config, self.path = config, out / WEIGHTS
        self.best, self.best_epoch, self.waited = math.inf, -1, 0
        self.looked = False
        self.restored_epoch = -1  # epoch of the checkpoint from which the run was resumed

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch, self.waited = state["best"], state["best_epoch"], state["waited"]

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.restored_epoch = checkpoint["epoch"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restores a damaged weights file from the checkpoint of a resumed run, if it contains these weights."""
        # The same answer for all processes, because each of them decides when to stop.
        if not trainer.strategy.broadcast(self.path.is_file() and damaged(self.path)):
            return
        if self.config.select == "last" or self.best_epoch == self.restored_epoch:
            _log.warning("%s was damaged; it is written again from the checkpoint", self.path)
            self.write(trainer, module)
            return
        _log.warning(
            "%s was damaged and held epoch %d, whose weights no checkpoint has: the best of the later epochs is kept",
            self.path,
            self.best_epoch + 1,
        )
        if trainer.is_global_zero:
            self.path.unlink()
        self.best, self.best_epoch = math.inf, -1

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.looked = True
        value = float(trainer.callback_metrics.get("valid_loss", math.inf))
        if value < self.best:
            self.best, self.best_epoch, self.waited = value, trainer.current_epoch, 0
            if self.config.select == "best":
                self.write(trainer, module)
            return
        self.waited += 1
        if self.config.patience and self.waited >= self.config.patience:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.config.select == "last":
            self.write(trainer, module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.best_epoch < 0 or not self.path.is_file():
            self.write(trainer, module)
        if self.config.select == "best" and self.best_epoch < 0 and self.looked:
            raise ValueError(
                "training.select=best found no validation loss that is finite, so the last weights were kept: lower "
                "training.lr, or set training.select=last"
            )

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            save_weights(self.path, module.model.state_dict())  # type: ignore[union-attr]
