"""`estimate_mi`: estimates the mutual information of two arrays, with a confidence interval."""

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
from .result import NORMAL_95, MIEstimate
from .training import Fit, fit

CRITICS = ("hybrid", "concat", "separable", "bilinear")
# The largest number of candidates in one evaluation. Time limits it; memory is O(B) in any case.
LARGEST_BLOCK, LARGEST_SCALAR_BLOCK, LARGEST_CONCAT_BLOCK = 8192, 4096, 1000
# Default learning rates. The scalar critic (two layers of 32 units) allows larger steps than networks of width 96.
HYBRID_RATE, SCALAR_RATE, OTHER_RATE = 3e-3, 1e-2, 1e-3
SCALAR_SHARE = 2  # divides the batch size of the scalar critic, which evaluates a network on every pair of the batch
LARGEST_VALIDATION = 2000
SPLIT = ("train", "validation", "held_out")
# The log density ratio of a weak dependence of I nats has mean I and variance 2 I, so the mean of n samples exceeds one
# standard deviation only if I > 2 / n. The validation samples, which stop the fit, cannot detect a weaker dependence.
LEAST_SIGNAL = 2.0

Pair = tuple[Tensor, Tensor]


@dataclass
class _Problem:
    """The three parts of the samples, and the settings of a fit."""

    train: Part
    validation: Part
    held_out: Part
    estimator: str
    settings: dict[str, Any]
    progress: Progress
    device: torch.device

    def fit(self, name: str, critic: Critic, train: Pair, validation: Pair, rate: float, share: int = 1) -> Fit:
        """Fits one critic. `rate` is the learning rate if the caller gave none; the batch size is batch_size /
        `share`."""
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
    """Fits two critics and returns the best of the first, the second and their mean on the validation samples.

    The first is a Gaussian critic with networks on few features on top, if the validation samples support a Gaussian
    part. The second consists of networks on all coordinates. If x and y are scalars, a network on the pair replaces the
    second.
    """
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
    """Splits and preprocesses the samples, and adds warnings about them to their notes."""
    parts = [index.to(samples.x.device) for index in split(samples.x.shape[0], fraction, generator)]
    inside = torch.cat(parts[:2])
    of_x, of_y = Preprocessing(samples.x[inside]), Preprocessing(samples.y[inside])
    for name, fitted, side in (("x", of_x, samples.x), ("y", of_y, samples.y)):
        samples.notes.extend(screening.outliers(name, fitted, side, samples.rows))
    parts[1] = parts[1][:LARGEST_VALIDATION]
    return [(of_x(samples.x[part]), of_y(samples.y[part])) for part in parts]


def _warnings(
    value: float,
    standard_error: float,
    candidates: int,
    ceiling: float,
    drop: float,
    fitted: _Fitted,
    settings: dict[str, Any],
) -> list[str]:
    found = []
    if not math.isfinite(value):
        found.append("not finite: the estimator diverged on some samples")
    if value > ceiling - 1:
        found.append(
            f"at the ceiling: the estimate cannot exceed {ceiling:.2f} nats for its {candidates} candidates; the truth "
            "may be higher"
        )
    elif math.isfinite(ceiling) and value > math.log(settings["batch_size"]) - 0.5:
        found.append(
            f"near log(batch_size) = {math.log(settings['batch_size']):.2f} nats: a larger batch_size trains it better"
        )
    if not all(m.converged for m in fitted.members):
        found.append(f"not converged: still improving after max_steps = {settings['max_steps']}")
    if value <= NORMAL_95 * standard_error:
        found.append(
            "no dependence was found: the interval contains 0. The critic may have missed dependence that more samples "
            "or fewer features would show, so this is no proof of independence"
        )
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
    """Estimates the mutual information of x and y in nats, with a standard error.

    A critic is fitted on a part of the samples; a bound with this critic is evaluated on training and on held-out
    samples.

    x, y: [N, Dx] and [N, Dy] (or [N]); NumPy arrays, tensors or nested lists of real numbers. One joint sample per row,
        N >= 50, rows independent of each other. Scale and units do not matter: the critic sees ranks, asinh of
        standardised coordinates and radii, all fitted on the training samples.
    estimator: "infonce" (default, both anchors; at most the log of the number of candidates), "nwj", "tuba", "dv",
        "mine", "js", "smile", "interpolated", "nce_club" (an upper bound), or another bound on pairs that
        `python -m mi_kernels bounds` lists.
    critic: "hybrid" (default: a Gaussian log density ratio plus networks), "separable", "concat" (an MLP on every pair,
        slow on a CPU), "bilinear", or a `Critic` of your own. A copy of your critic is trained; it sees the Dx and Dy
        coordinates as normal quantiles of their ranks.
    held_out: fraction of the samples that the fit does not see. A fifth of the others decides when the fit stops.
    max_steps, batch_size, learning_rate: of the fit.
    seed: equal seeds give equal results on one machine.

    Returns an `MIEstimate`, which explains how value and standard error are computed. Its `warnings` name duplicated
    rows (which are left out), outliers, serially correlated rows, and a fit that found no dependence, did not
    converge, overfitted or reached its ceiling. The caller's random state, gradient mode and default dtype are not
    changed.

    Cost of the default: about max_steps steps of two networks with 2 E batch_size^2 FLOP each for the scores, then 2 E
    M^2 with M = min(held-out samples, 8192) and E = 26 + the number of canonical pairs. Two scalars add 2 H^2
    (batch_size / 2)^2 per step and 2 H^2 M^2 with H = 32. O(N) memory.

    Raises ValueError that names the argument for input that is not real, finite, dense and non-constant, for fewer than
    50 samples, for different N, and for settings out of range. Sources: van den Oord et al. 2018 (InfoNCE), Poole et
    al. 2019 (critics and bounds), Czyż et al. 2023 (held-out protocol).
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
        # Not torch.manual_seed: it would also seed devices whose state is not restored afterwards.
        torch.default_generator.manual_seed(int(seed))
        settings: dict[str, Any] = {"max_steps": int(max_steps), "batch_size": int(batch_size)}
        if learning_rate is not None:
            settings["learning_rate"] = float(learning_rate)
        return _estimate(samples, estimator, critic, held_out, progress, start, generator, settings)


def _evaluate(fitted: _Fitted, train: Part, outside: Part) -> tuple[evaluation.Value, float]:
    """The value on the held-out samples, and on the same number of training samples."""
    critic = fitted.objective.critic
    block = LARGEST_BLOCK if isinstance(critic, InnerProductCritic) else LARGEST_CONCAT_BLOCK
    if isinstance(critic, ScalarCritic):
        block = LARGEST_SCALAR_BLOCK
    held = evaluation.evaluate(fitted.objective, *fitted.inputs(*outside), block)
    x, y = (t[: outside[0].features.shape[0]] for t in fitted.inputs(*train))
    # Both use the same number of candidates, because the value of InfoNCE depends on it.
    return held, evaluation.evaluate(fitted.objective, x, y, held.candidates, error=False).mean


def _middle(held: evaluation.Value, train_value: float, counts: dict[str, int]) -> tuple[float, float, float]:
    """The value, its sampling error and its fit error, see `MIEstimate`."""
    seen = min(counts["train"], counts["held_out"])
    sampling_error = held.sampling_error * math.sqrt(1 + counts["held_out"] / seen) / 2
    # Half of the drop has a sampling error of its own: a drop that is small by chance does not prove a good fit.
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
    standard_error = math.hypot(sampling_error, fit_error)
    warned = _warnings(value, standard_error, held.candidates, ceiling, drop, fitted, settings)
    return MIEstimate(
        value=value,
        standard_error=standard_error,
        sampling_error=sampling_error,
        fit_error=fit_error,
        held_out_value=held.mean,
        train_value=train_value,
        ceiling=ceiling,
        warnings=(*samples.notes, *warned),
        history=tuple({"member": k, **row} for k, member in enumerate(fitted.members) for row in member.history),
        estimator=estimator,
        critic=critic if isinstance(critic, str) else type(critic).__name__,
        samples=counts,
        seconds=time.perf_counter() - start,
    )
