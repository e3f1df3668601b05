"""The result of `estimate_mi`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

NORMAL_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class MIEstimate:
    """An estimate of mutual information in nats. Negative values are not clipped.

    `value` is the mean of `train_value` and `held_out_value`. A fitted critic overestimates on its training samples and
    underestimates on other samples. In a model with many weak directions that are shrunk optimally, which early
    stopping on validation samples approximates, the two errors are equal, and their mean is unbiased. `held_out_value`
    alone is a lower bound in expectation and lies below the truth by half of the difference.

    `standard_error` combines two parts. `sampling_error` is the sampling error of the mean of both values. `fit_error`
    is half of the drop from `train_value` to `held_out_value` plus the sampling error of that half, because the fit may
    have stopped too early or too late. It is at least 2 over the number of validation samples, the weakest dependence
    that they can detect. Neither part covers a dependence that the critic cannot represent.
    """

    value: float
    standard_error: float
    sampling_error: float
    fit_error: float
    held_out_value: float
    train_value: float
    ceiling: float  # the largest possible value: log of the number of candidates for InfoNCE, infinite without one
    warnings: tuple[str, ...]
    history: tuple[dict[str, float], ...]  # member (number of the fitted critic), step, train and validation objective
    estimator: str
    critic: str
    samples: dict[str, int]  # train, validation, held_out
    seconds: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two ends of the interval in nats: value ± z standard errors, where a standard normal variable lies within
        ± z with probability `level`.

        How often the interval contains the truth was measured for 0.95 alone. Raises ValueError for a level outside
        (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, for example 0.95; got {level!r}")
        half = NormalDist().inv_cdf((1 + level) / 2) * self.standard_error
        return self.value - half, self.value + half

    def as_dict(self) -> dict[str, Any]:
        """All fields and the interval, for JSON; numbers that are not finite become None."""
        found = asdict(self) | {"interval_95": list(self.interval())}
        return {name: _json(value) for name, value in found.items()}

    def plot(self, axes: Any = None) -> Any:
        """Plots the fit and the value with its interval; returns the matplotlib axes. Needs matplotlib."""
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
        members = sorted({int(row["member"]) for row in self.history})
        for member in members:
            rows = [row for row in self.history if row["member"] == member]
            steps = [row["step"] for row in rows]
            name = f" {member}" if len(members) > 1 else ""
            axes.plot(steps, [row["train"] for row in rows], f"C{member}:", label=f"training batches{name}")
            axes.plot(steps, [row["validation"] for row in rows], f"C{member}-", label=f"validation{name}")
        low, high = self.interval()
        axes.axhline(self.value, color="black", label=f"estimate {self.value:.3f}")
        axes.axhspan(low, high, color="black", alpha=0.12, linewidth=0)
        if self.value > self.ceiling - 2:
            axes.axhline(self.ceiling, color="red", linestyle="--", label="ceiling")
        axes.set(xlabel="step", ylabel="nats", title=f"{self.estimator}, {self.critic} critic")
        axes.legend(fontsize="small")
        return axes

    def __str__(self) -> str:
        low, high = self.interval()
        text = f"{self.value:.4f} ± {self.standard_error:.4f} nats (95 % interval {low:.4f} to {high:.4f})"
        return "\n".join([text, *(f"warning: {w}" for w in self.warnings)])


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, (list, tuple)) else value
