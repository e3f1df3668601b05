"""One training run with Lightning, from the start or from a checkpoint, and the files in its folder."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from models.data import Dataset, load
from models.model import Model
from models.registry import build
from models.settings import RunConfig, read
from models.training.checkpoint import WEIGHTS, AtomicCheckpoints, load_weights, misfit
from models.training.distributed import Processes, check_shares, launch, processes_of, trainer_options
from models.training.folder import check_digest, checkpoint_of, refuse_folder, start_folder
from models.training.history import epochs_of
from models.training.phases import Training
from models.training.selection import Selection
from models.training.steps import check_batches, check_finite, least_rows

_log = logging.getLogger(__name__)

PRECISIONS = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def load_data(config: RunConfig) -> Dataset:
    return load(config.data, config.seed)


def fit(
    config: RunConfig,
    data: Dataset,
    out: Path,
    *,
    resume: str | bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Iterable[Callback] = (),
) -> Training:
    """Trains a model. Writes config.yaml, run.json, last.ckpt, weights.safetensors, logs/ (CSV) and tensorboard/ to
    ``out``.

    resume: continue from last.ckpt (True or "last") or from the checkpoint before it ("previous"), on the same data and
        with the same settings, except for ``epochs`` and ``devices``.
    overwrite: replace an existing run in ``out``.
    progress: show a progress bar on a terminal, otherwise one line per epoch.

    With ``training.devices`` above 1, training runs in separate processes with copies of the callbacks; a calling
    script needs ``if __name__ == "__main__"``. Under torchrun and SLURM every process calls this function.

    Raises ValueError, without changing the folder, if ``out`` holds a run that is neither resumed nor overwritten, if
    settings or data differ from those of the resumed run, for a damaged checkpoint, for values that are not finite, and
    for settings that do not fit the data (for example, if a phase cannot use any batch). Raises ValueError at the end
    of a run in which a phase took no step, and NotFinite if a loss becomes NaN or infinite.
    """
    processes = processes_of(config.training.devices)
    checkpoint = None
    if resume:
        checkpoint = checkpoint_of(config, data, out, "previous" if resume == "previous" else "last")
    else:
        refuse_folder(out, overwrite=overwrite)
    check_finite(data)
    loaders = (
        data.loader("train", config.training.batch_size, seed=config.seed),
        data.loader("valid", config.training.batch_size),
    )
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    model = build(config.name, config.model, data, config.seed)
    check_shares(processes, config.training, model)
    module = Training(model, data, config.training, config.training.epochs * len(loaders[0]))
    check_batches(module, loaders, least_rows(processes.number))
    if config.training.precision == "64":
        module.double()  # Lightning loads checkpoints before converting the model, which would round weights
    if processes.number > 1 and processes.environment is None:
        launch(_rank, (config, data, out, resume, overwrite, progress, tuple(callbacks)), processes.number)
    else:
        _train(module, loaders, config, out, checkpoint, progress, callbacks, processes)
        if processes.number == 1 and config.training.select == "last":
            return module
    model.load_state_dict(load_weights(out / WEIGHTS))
    return module


def _rank(config: RunConfig, data: Dataset, out: Path, resume: str | bool, overwrite: bool, *rest: Any) -> None:
    progress, callbacks = rest
    fit(config, data, out, resume=resume, overwrite=overwrite, progress=progress, callbacks=callbacks)


def _train(
    module: Training,
    loaders: tuple[Any, Any],
    config: RunConfig,
    out: Path,
    checkpoint: Path | None,
    progress: bool,
    callbacks: Iterable[Callback],
    processes: Processes,
) -> None:
    """Trains in this process, which may be one of several."""
    alone = not torch.distributed.is_initialized()
    with quiet():
        trainer = _trainer(config, out, progress, callbacks, processes)
        if trainer.is_global_zero:
            if checkpoint is None:
                start_folder(config, module.data, out)
            else:
                config.save(out)
        path = None if checkpoint is None else str(checkpoint)
        try:
            trainer.fit(module, *loaders, ckpt_path=path, weights_only=True)
        except RuntimeError as error:
            if checkpoint is None or "loading state_dict" not in str(error):
                raise
            raise misfit(checkpoint, error) from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    if processes.number > 1:
        # Other ranks continue only after rank 0 has written all files, and no rank ends while others still communicate.
        trainer.strategy.barrier()
        if alone:
            torch.distributed.destroy_process_group()


class Lines(Callback):
    """Prints one line per epoch, for output that is not a terminal."""

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self.started
        shown = ("loss", "valid_loss")
        values = [
            f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in shown if name in trainer.callback_metrics
        ]
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(values)}  {seconds:.1f} s", flush=True
        )


def _trainer(
    config: RunConfig, out: Path, progress: bool, callbacks: Iterable[Callback], processes: Processes
) -> Trainer:
    """Builds the Trainer without writing files. Raises ValueError for an accelerator that this machine lacks."""
    try:
        return Trainer(**_trainer_options(config, out, progress, callbacks), **trainer_options(processes))
    except (MisconfigurationException, RuntimeError) as error:
        given = config.training.accelerator
        raise ValueError(f"training.accelerator {given!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _trainer_options(config: RunConfig, out: Path, progress: bool, callbacks: Iterable[Callback]) -> dict[str, Any]:
    training = config.training
    # A resumed run writes a new version beside the old one: CSVLogger would delete a file that exists.
    loggers = [CSVLogger(out, name="logs"), TensorBoardLogger(out, name="tensorboard")]
    keep = ModelCheckpoint(dirpath=out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    terminal = sys.stderr.isatty()
    bar: list[Callback] = []
    if progress:
        bar = [TQDMProgressBar(refresh_rate=10, leave=True) if terminal else Lines()]
    return {
        "max_epochs": training.epochs,
        "check_val_every_n_epoch": training.look_every,
        "accelerator": training.accelerator,
        "precision": PRECISIONS[training.precision],
        "deterministic": training.deterministic,
        "logger": loggers,
        "callbacks": [*bar, *callbacks, Selection(training, out), keep],
        "plugins": [AtomicCheckpoints()],
        "enable_progress_bar": progress and terminal,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }


def load_run(out: Path, data: Dataset) -> tuple[RunConfig, Model]:
    """The settings and the trained model of a run. Raises ValueError if the data has changed since training."""
    config = read(out)
    check_digest(out, data)
    model = build(config.name, config.model, data, config.seed)
    weights = load_weights(out / WEIGHTS)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise misfit(out / WEIGHTS, error) from error
    done = epochs_of(out)
    if 0 < done < config.training.epochs and not config.training.patience:
        remedy = f"continue with: python -m models fit --resume --out {out}"
        _log.warning("%s: training stopped after %d of %d epochs; %s", out, done, config.training.epochs, remedy)
    return config, model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Lightning's hints on workers, devices and checkpoint folders, but not its errors."""
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
