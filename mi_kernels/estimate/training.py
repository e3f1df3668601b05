"""Fits a critic with AdamW and averaged weights, and keeps the weights that were best on the validation samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EVERY = 50  # steps between two validations
PATIENCE = 8  # the fit ends after this many validations without progress
AVERAGE = 0.99
WARM_UP = 50
WEIGHT_DECAY = 0.1
LEAST_PROGRESS = 1e-4

Report = Callable[[int, float], None]


@dataclass
class Fit:
    """A fitted objective with the best weights. `score` is the negative learning loss on the validation samples."""

    objective: nn.Module
    score: float
    best_step: int
    history: list[dict[str, float]]
    converged: bool


def _optimizer(objective: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    decayed = [p for p in objective.parameters() if p.requires_grad and p.dim() > 1]
    free = [p for p in objective.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, foreach=True)


def _rate(step: int, max_steps: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine decay to 1/20."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return min(1.0, step / WARM_UP) * (0.05 + 0.95 * cosine)


def fit(
    objective: nn.Module,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    report: Report,
) -> Fit:
    """Minimises `objective.learning_loss` in place, on batches drawn with replacement. Returns a `Fit`."""
    averaged = copy.deepcopy(objective).eval()
    best_state, best, best_step = copy.deepcopy(averaged.state_dict()), _score(averaged, validation), 0
    history: list[dict[str, float]] = [{"step": 0, "train": math.nan, "validation": best}]
    if not any(p.requires_grad for p in objective.parameters()):
        return Fit(averaged, best, 0, history, True)
    optimizer, rates = _optimizer(objective, learning_rate), learning_rate
    pairs = list(zip(averaged.parameters(), objective.parameters(), strict=True))
    x, y = train
    recent: list[Tensor] = []
    waited = 0
    objective.train()
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rates * _rate(step, max_steps)
        index = torch.randint(x.shape[0], (min(batch_size, x.shape[0]),), generator=generator).to(x.device)
        loss = objective.learning_loss(x[index], y[index])  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(loss.detach())
        with torch.no_grad():
            torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - min(AVERAGE, step / (step + 10)))
        if step % EVERY and step != max_steps:
            continue
        score = _score(averaged, validation)
        history.append({"step": step, "train": -torch.stack(recent).mean().item(), "validation": score})
        recent.clear()
        report(step, score)
        # Written so that a NaN counts as no progress.
        if score > best + LEAST_PROGRESS:
            best, best_step, waited, best_state = score, step, 0, copy.deepcopy(averaged.state_dict())
        else:
            waited += 1
        if waited == PATIENCE:
            break
    averaged.load_state_dict(best_state)
    return Fit(averaged, best, best_step, history, best_step < 0.9 * max_steps)


@torch.no_grad()
def _score(objective: nn.Module, samples: tuple[Tensor, Tensor]) -> float:
    value: float = -objective.learning_loss(*samples).item()  # type: ignore[operator]
    return value
