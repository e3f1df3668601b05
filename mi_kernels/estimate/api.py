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
from .hybrid import HybridCritic, MeanCritic, Part, ScalarCritic, choose_pairs
from .inputs import Samples, check_samples, check_settings, split
from .preprocessing import Coordinates, Preprocessing
from .progress import Progress
from .result import MIEstimate
from .training import Fit, fit

CRITICS = ("hybrid", "concat", "separable", "bilinear")
# Samples that are each other's negatives in one evaluation: bounded by time, as memory is O(B) either way.
LARGEST_BLOCK, LARGEST_SCALAR_BLOCK, LARGEST_CONCAT_BLOCK = 8192, 4096, 1000
# Of the learning rates: two layers of 32 units take larger steps than two networks of 96.
HYBRID_RATE, SCALAR_RATE, OTHER_RATE = 3e-3, 1e-2, 1e-3
SCALAR_SHARE = 2  # half of a batch has a quarter of its pairs, each of which passes that network
LARGEST_VALIDATION = 2000
SPLIT = ("train", "validation", "held_out")
# The log density ratio of a weak dependence of I nats has mean I and variance 2 I: the mean of n stands out by one
# deviation from I = 2 / n on. The validation samples, which stop the fit, see nothing weaker.
LEAST_SIGNAL = 2.0

Pair = tuple[Tensor, Tensor]


@dataclass
class _Problem:
    """The three parts of the samples and how a fit runs."""

    train: Part
    validation: Part
    held_out: Part
    estimator: str
    settings: dict[str, Any]
    progress: Progress
    device: torch.device

    def fit(self, name: str, critic: Critic, train: Pair, validation: Pair, rate: float, share: int = 1) -> Fit:
        """`rate` is what the learning rate is where the caller named none; batches are batch_size / `share`."""
        report, close = self.progress.member(name)
        try:
            made = registry.find(self.estimator).estimator(critic).to(self.device, torch.float32)
            settings = {"learning_rate": rate} | self.settings
            settings["batch_size"] = max(2, settings["batch_size"] // share)
            return fit(made, train, validation, **settings, report=report)
        finally:
            close()


@dataclass
class _Fitted:
    objective: nn.Module
    members: list[Fit]
    inputs: Callable[[Coordinates, Coordinates], Pair]


def _fit_hybrid(problem: _Problem) -> _Fitted:
    """Networks on top of a Gaussian, if the validation samples see one, that see little; networks alone that see
    every coordinate; then the better of the two and of their mean, by the validation samples. For one coordinate on
    either side a network on both stands in for the networks alone."""
    pairs, _ = choose_pairs(problem.train, problem.validation)
    count = pairs.correlations.numel()
    train, validation = pairs.inputs(*problem.train), pairs.inputs(*problem.validation)
    x_widths, y_widths = pairs.widths(*problem.train)
    scalars = all(side.normal.shape[-1] == 1 for side in problem.train)
    name = f"networks on {count} canonical pairs"
    members = [problem.fit(name, HybridCritic(count, x_widths, y_widths), train, validation, HYBRID_RATE)]
    if scalars:
        scalar = ScalarCritic(x_widths[1], y_widths[1])
        members.append(problem.fit("a network of both", scalar, train, validation, SCALAR_RATE, SCALAR_SHARE))
    else:
        alone = HybridCritic(count, x_widths, y_widths, gaussian=False)
        members.append(problem.fit("networks", alone, train, validation, HYBRID_RATE))
    candidates = [m.objective for m in members]
    critics: list[Any] = [m.objective.critic for m in members]
    if len(critics) > 1 and all(isinstance(critic, InnerProductCritic) for critic in critics):
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
        fitted = problem.fit(f"{critic} critic", made, train, validation, OTHER_RATE)
    else:
        fitted = problem.fit(type(critic).__name__, copy.deepcopy(critic), train, validation, OTHER_RATE)
    return _Fitted(fitted.objective, [fitted], inputs)


def _prepare(samples: Samples, fraction: float, generator: torch.Generator) -> list[Part]:
    """The parts as the critics see them; what is odd about the samples is added to their notes."""
    parts = [index.to(samples.x.device) for index in split(samples.x.shape[0], fraction, generator)]
    inside = torch.cat(parts[:2])
    of_x, of_y = Preprocessing(samples.x[inside]), Preprocessing(samples.y[inside])
    for name, fitted, side in (("x", of_x, samples.x), ("y", of_y, samples.y)):
        samples.notes.extend(screening.outliers(name, fitted, side, samples.rows))
    parts[1] = parts[1][:LARGEST_VALIDATION]
    return [(of_x(samples.x[part]), of_y(samples.y[part])) for part in parts]


def _warnings(
    value: float, candidates: int, ceiling: float, drop: float, fitted: _Fitted, settings: dict[str, Any]
) -> list[str]:
    found = []
    if not math.isfinite(value):
        found.append("not finite: the estimator diverged on some of the samples")
    if value > ceiling - 1:
        found.append(
            f"at the ceiling: the estimate cannot exceed {ceiling:.2f} nats for its {candidates} candidates; the truth "
            "may be higher"
        )
    elif math.isfinite(ceiling) and value > math.log(settings["batch_size"]) - 0.5:
        found.append(
            f"near log(batch_size) = {math.log(settings['batch_size']):.2f} nats: larger batches train it better"
        )
    if not all(m.converged for m in fitted.members):
        found.append(f"not converged: still improving after max_steps = {settings['max_steps']}")
    if value < 0:
        found.append("negative: no dependence was found; the mutual information itself is never negative")
    if drop > 0.4:
        found.append(f"overfitted: {drop:.2f} nats between training and held-out samples; more samples help")
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
    """Mutual information of x and y in nats, from the value of a fit on samples that no part of it has seen and on
    those that it was made with.

    x [N, Dx] and y [N, Dy] (or [N]): numpy arrays, tensors or nested lists of real numbers, one joint sample per row,
    N >= 50, rows independent of each other. Scale and units do not matter: what the critic sees is made of ranks,
    asinh of standardised coordinates and radii, fitted on the training samples.

    `estimator`: "infonce" (both anchors; at most log of the candidates), "nwj", "tuba", "dv", "mine", "js", "smile",
    "interpolated", "nce_club" (an upper bound), and every further bound on pairs that `python -m mi_kernels bounds`
    lists. `critic`: "hybrid" (Gaussian log density ratio plus networks; the default, and with "infonce" what the
    figures of the README are measured with), "separable", "concat" (every pair through an MLP: slow on a CPU),
    "bilinear", or a `Critic` of yours, of which a copy is trained; it sees the Dx and Dy coordinates as normal
    quantiles of their ranks.

    A random `held_out` fraction is kept from the fit, which a fifth of the rest stops; `MIEstimate` says how value and
    standard error come from both. `warnings` names copied rows, which are left out, outliers, rows that follow each
    other as in a time series, and a fit that did not converge, overfitted or reached its ceiling.

    Equal seeds give equal results on one machine. Random state, gradient mode and default dtype of the caller stay as
    they are. Cost of the default: about max_steps steps of two networks on batches, 2 E batch_size^2 FLOPs each for
    the scores, then 2 E M^2 with M = min(held-out samples, 8192) and E = 26 + canonical pairs; for two scalars
    2 H^2 (batch_size / 2)^2 and 2 H^2 M^2 with H = 32 beside that; O(N) memory.

    Raises ValueError, naming the argument, for anything but real numbers, NaN, infinite, constant, masked or sparse
    input, fewer than 50 samples, differing N, and settings out of range. Sources: van den Oord et al. 2018 (InfoNCE),
    Poole et al. 2019 (critics, bounds), Czyż et al. 2023 (held-out protocol).
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
        settings: dict[str, Any] = {"max_steps": int(max_steps), "batch_size": int(batch_size)}
        if learning_rate is not None:
            settings["learning_rate"] = float(learning_rate)
        return _estimate(samples, estimator, critic, held_out, progress, start, generator, settings)


def _evaluate(fitted: _Fitted, train: Part, outside: Part) -> tuple[evaluation.Value, float]:
    """The value on the held-out samples, and on as many of the training samples."""
    critic = fitted.objective.critic
    block = LARGEST_BLOCK if isinstance(critic, InnerProductCritic) else LARGEST_CONCAT_BLOCK
    if isinstance(critic, ScalarCritic):
        block = LARGEST_SCALAR_BLOCK
    held = evaluation.evaluate(fitted.objective, *fitted.inputs(*outside), block)
    x, y = (t[: outside[0].features.shape[0]] for t in fitted.inputs(*train))
    # The same number of candidates: the value of InfoNCE depends on it.
    return held, evaluation.evaluate(fitted.objective, x, y, held.candidates, error=False).mean


def _middle(held: evaluation.Value, train_value: float, counts: dict[str, int]) -> tuple[float, float, float]:
    """The value, its sampling error and its fit error: see `MIEstimate`."""
    seen = min(counts["train"], counts["held_out"])
    sampling_error = held.sampling_error * math.sqrt(1 + counts["held_out"] / seen) / 2
    # Half of the drop has that very sampling error too: a drop that came out small by chance is no proof of a good fit.
    fit_error = max(train_value - held.mean, 0.0) / 2 + sampling_error
    return (held.mean + train_value) / 2, sampling_error, max(fit_error, LEAST_SIGNAL / counts["validation"])


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
    held, train_value = _evaluate(fitted, train, outside)
    counts = {name: part[0].features.shape[0] for name, part in zip(SPLIT, (train, validation, outside), strict=True)}
    value, sampling_error, fit_error = _middle(held, train_value, counts)
    ceiling = registry.find(estimator).highest(held.candidates)
    drop = train_value - held.mean
    return MIEstimate(
        value=value,
        standard_error=math.hypot(sampling_error, fit_error),
        sampling_error=sampling_error,
        fit_error=fit_error,
        held_out_value=held.mean,
        train_value=train_value,
        ceiling=ceiling,
        warnings=(*samples.notes, *_warnings(value, held.candidates, ceiling, drop, fitted, settings)),
        history=tuple({"member": k, **row} for k, member in enumerate(fitted.members) for row in member.history),
        estimator=estimator,
        critic=critic if isinstance(critic, str) else type(critic).__name__,
        samples=counts,
        seconds=time.perf_counter() - start,
    )
