"""`estimate_mi`: from two arrays to a number with its uncertainty."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import registry
from ..critics import BilinearCritic, ConcatCritic, Critic, InnerProductCritic, SeparableCritic
from . import held_out as evaluation
from . import screening
from .hybrid import HybridCritic, MeanCritic, choose_pairs
from .inputs import Samples, check_samples, check_settings, split
from .preprocessing import Coordinates, Preprocessing
from .progress import Progress
from .result import MIEstimate
from .training import Fit, fit

CRITICS = ("hybrid", "concat", "separable", "bilinear")
# Samples that are each other's negatives in one evaluation: bounded by time, as memory is O(B) either way.
LARGEST_BLOCK, LARGEST_CONCAT_BLOCK = 8192, 1000
LARGEST_VALIDATION = 2000

Pair = tuple[Tensor, Tensor]


@dataclass
class _Problem:
    """The three parts of the samples and how a fit runs."""

    train: tuple[Coordinates, Coordinates]
    validation: tuple[Coordinates, Coordinates]
    held_out: tuple[Coordinates, Coordinates]
    estimator: str
    settings: dict[str, Any]
    progress: Progress
    device: torch.device

    def fit(self, name: str, critic: Critic, train: Pair, validation: Pair) -> Fit:
        report, close = self.progress.member(name)
        try:
            made = registry.find(self.estimator).estimator(critic).to(self.device, torch.float32)
            return fit(made, train, validation, **self.settings, report=report)
        finally:
            close()


@dataclass
class _Fitted:
    objective: nn.Module
    members: list[Fit]
    inputs: Callable[[Coordinates, Coordinates], Pair]


def _fit_hybrid(problem: _Problem) -> _Fitted:
    """Networks alone, and networks on top of a Gaussian when the validation samples see one; then the better of the
    two and of their mean, by the validation samples."""
    pairs, _ = choose_pairs(problem.train, problem.validation)
    count = pairs.correlations.numel()
    train, validation = pairs.inputs(*problem.train), pairs.inputs(*problem.validation)
    x_width, y_width = (c.features.shape[-1] for c in problem.train)
    members = []
    for gaussian in (True, False) if count else (False,):
        name = f"networks on {count} canonical pairs" if gaussian else "networks"
        members.append(problem.fit(name, HybridCritic(count, x_width, y_width, gaussian=gaussian), train, validation))
    candidates = [m.objective for m in members]
    if len(members) > 1:
        critics: list[Any] = [m.objective.critic for m in members]
        mean = registry.find(problem.estimator).estimator(MeanCritic(critics))
        candidates.append(mean.to(problem.device, torch.float32).eval())
    with torch.no_grad():
        scores = [-c.learning_loss(*validation).item() for c in candidates]  # type: ignore[operator]
    best = max(range(len(scores)), key=lambda k: scores[k] if not math.isnan(scores[k]) else -math.inf)
    return _Fitted(candidates[best], members, pairs.inputs)


def _fit_given(problem: _Problem, critic: Critic | str) -> _Fitted:
    given = isinstance(critic, Critic)

    def inputs(x: Coordinates, y: Coordinates) -> Pair:
        return (x.normal, y.normal) if given else (x.features, y.features)

    train, validation = inputs(*problem.train), inputs(*problem.validation)
    if isinstance(critic, str):
        x_dim, y_dim = train[0].shape[-1], train[1].shape[-1]
        if critic == "concat":
            made: Critic = ConcatCritic(x_dim, y_dim, (64, 64))
        elif critic == "separable":
            made = SeparableCritic(x_dim, y_dim, (128, 128), 32)
        else:
            made = BilinearCritic(x_dim, y_dim)
        fitted = problem.fit(f"{critic} critic", made, train, validation)
    else:
        fitted = problem.fit(type(critic).__name__, copy.deepcopy(critic), train, validation)
    return _Fitted(fitted.objective, [fitted], inputs)


def _prepare(samples: Samples, fraction: float, generator: torch.Generator) -> list[tuple[Coordinates, Coordinates]]:
    """The parts as the critics see them; what is odd about the samples is added to their notes."""
    parts = [index.to(samples.x.device) for index in split(samples.x.shape[0], fraction, generator)]
    inside = torch.cat(parts[:2])
    of_x, of_y = Preprocessing(samples.x[inside]), Preprocessing(samples.y[inside])
    for name, fitted, side in (("x", of_x, samples.x), ("y", of_y, samples.y)):
        samples.notes.extend(screening.outliers(name, fitted, side, samples.rows))
    parts[1] = parts[1][:LARGEST_VALIDATION]
    return [(of_x(samples.x[part]), of_y(samples.y[part])) for part in parts]


def _warnings(
    held: evaluation.Value, ceiling: float, fit_error: float, fitted: _Fitted, settings: dict[str, Any]
) -> list[str]:
    found = []
    if not math.isfinite(held.mean):
        found.append("not finite: the estimator diverged on the held-out samples")
    if held.mean > ceiling - 1:
        found.append(
            f"at the ceiling: the estimate cannot exceed {ceiling:.2f} nats for its {held.candidates} candidates; the "
            "truth may be higher"
        )
    elif math.isfinite(ceiling) and held.mean > math.log(settings["batch_size"]) - 0.5:
        found.append(
            f"near log(batch_size) = {math.log(settings['batch_size']):.2f} nats: larger batches train it better"
        )
    if not all(m.converged for m in fitted.members):
        found.append(f"not converged: still improving after max_steps = {settings['max_steps']}")
    if held.mean < 0:
        found.append("negative: no dependence was found; the mutual information itself is never negative")
    if fit_error > 0.2:
        found.append(f"overfitted: {fit_error:.2f} nats between training and held-out samples; more samples help")
    return found


def estimate_mi(
    x: Any,
    y: Any,
    *,
    estimator: str = "infonce",
    critic: str | Critic = "hybrid",
    max_steps: int = 1500,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    held_out: float = 0.5,
    learning_rate: float | None = None,
) -> MIEstimate:
    """Mutual information of x and y in nats, estimated on samples that no part of the fit has seen.

    x [N, Dx] and y [N, Dy] (or [N]): numpy arrays, tensors or nested lists of real numbers, one joint sample per row,
    N >= 50, rows independent of each other. Scale and units do not matter: what the critic sees is made of ranks,
    asinh of standardised coordinates and radii, fitted on the training samples.

    `estimator`: "infonce" (both anchors; at most log of the candidates), "nwj", "tuba", "dv", "mine", "js", "smile",
    "interpolated", "nce_club" (an upper bound). `critic`: "hybrid" (Gaussian log density ratio plus networks; the
    default, and with "infonce" what the figures of the README are measured with), "separable", "concat" (every pair
    through an MLP: slow on a CPU), "bilinear", or a `Critic` of yours, of which a copy is trained; it sees the Dx and
    Dy coordinates as normal quantiles of their ranks.

    A random `held_out` fraction gives the value and its standard error; a fifth of the rest stops the fit. Equal
    seeds give equal results on one machine. Random state, gradient mode and default dtype of the caller stay as they
    are. Cost of the default: about max_steps steps of two networks on batches, 2 E batch_size^2 FLOPs each for the
    scores, then 2 E M^2 with M = min(held-out samples, 8192) and E = 26 + canonical pairs; O(N) memory.

    Raises ValueError, naming the argument, for NaN, infinite, constant, complex or object input, fewer than 50
    samples, differing N, and settings out of range. Sources: van den Oord et al. 2018 (InfoNCE), Poole et al. 2019
    (critics, bounds), Czyż et al. 2023 (held-out protocol).
    """
    start = time.perf_counter()
    check_settings(
        estimator=estimator,
        critic=critic,
        critics=CRITICS,
        max_steps=max_steps,
        batch_size=batch_size,
        seed=seed,
        held_out=held_out,
        learning_rate=learning_rate,
        progress=progress,
    )
    samples = check_samples(x, y, device)
    where = samples.x.device
    generator = torch.Generator().manual_seed(int(seed))
    cuda = [where] if where.type == "cuda" else []
    mode = torch.autocast(where.type, enabled=False)
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad(), mode:
        # Not torch.manual_seed, which would seed devices that are not forked.
        torch.default_generator.manual_seed(int(seed))
        rate = float(learning_rate or (3e-3 if critic == "hybrid" else 1e-3))
        settings = {"max_steps": int(max_steps), "batch_size": int(batch_size), "learning_rate": rate}
        return _estimate(samples, estimator, critic, held_out, progress, start, generator, settings)


def _estimate(
    samples: Samples,
    estimator: str,
    critic: str | Critic,
    fraction: float,
    progress: bool,
    start: float,
    generator: torch.Generator,
    settings: dict[str, Any],
) -> MIEstimate:
    train, validation, outside = _prepare(samples, fraction, generator)
    shown = Progress(progress, settings["max_steps"])
    problem = _Problem(
        train, validation, outside, estimator, settings | {"generator": generator}, shown, samples.x.device
    )
    fitted = _fit_hybrid(problem) if critic == "hybrid" else _fit_given(problem, critic)
    inner = isinstance(fitted.objective.critic, InnerProductCritic)
    block = LARGEST_BLOCK if inner else LARGEST_CONCAT_BLOCK
    held = evaluation.evaluate(fitted.objective, *fitted.inputs(*outside), block)
    x_seen, y_seen = (t[: outside[0].features.shape[0]] for t in fitted.inputs(*train))
    train_value = evaluation.evaluate(fitted.objective, x_seen, y_seen, block, error=False).mean
    fit_error = abs(train_value - held.mean)
    ceiling = registry.find(estimator).highest(held.candidates)
    return MIEstimate(
        value=held.mean,
        standard_error=math.hypot(held.sampling_error, fit_error),
        sampling_error=held.sampling_error,
        fit_error=fit_error,
        train_value=train_value,
        ceiling=ceiling,
        warnings=(*samples.notes, *_warnings(held, ceiling, fit_error, fitted, settings)),
        history=tuple({"member": k, **row} for k, member in enumerate(fitted.members) for row in member.history),
        estimator=estimator,
        critic=critic if isinstance(critic, str) else type(critic).__name__,
        samples={
            name: part[0].features.shape[0]
            for name, part in (("train", train), ("validation", validation), ("held_out", outside))
        },
        seconds=time.perf_counter() - start,
    )
