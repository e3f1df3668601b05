"""The steps of ``models fit`` without its trainer: no logs, no checkpoints, the same weights in half the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.data.dataset import Dataset
from models.model import Model
from models.registry import build
from models.settings import RunConfig
from models.training.phases import Training


class _Steps(Training):
    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)


def train(config: RunConfig, data: Dataset) -> Model:
    """The model after all its steps, in eval mode; small evidence runs take half the time of ``fit``.

    Raises ValueError for settings that need the trainer: corruption, clipping, a schedule, or the best epoch's weights.
    """
    training = config.training
    if training.clip or training.warmup or training.schedule != "constant" or training.select != "last":
        raise ValueError("training must have no clip, warmup, schedule or selection here: use models.training.fit")
    if training.corruption.active:
        raise ValueError("training.corruption needs the trainer: use models.training.fit")
    if training.threads:
        torch.set_num_threads(training.threads)
    model = build(config.name, config.model, data, config.seed)
    loader: Any = data.loader("train", training.batch_size, seed=config.seed)
    steps = _Steps(model, data, training, training.epochs * len(loader)).train()
    optimizers = steps.configure_optimizers()
    for epoch in range(training.epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            _step(steps, optimizers, batch)
    return model.eval()


def _step(steps: _Steps, optimizers: list[torch.optim.Optimizer], batch: Any) -> None:
    generator = steps.generator(int(steps.batches_seen))
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # for dropout
    batch = steps.prepared(batch, generator)
    for phase, optimizer in zip(steps.phases, optimizers, strict=True):
        found = steps.run_phase(phase, optimizer, batch, generator)
        if found is not None and not torch.isfinite(found.total):
            raise RuntimeError(f"the loss became {found.total.item()}: lower training.lr")
    steps.batches_seen += 1
