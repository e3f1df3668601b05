"""What `estimate_mi` returns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class MIEstimate:
    """Mutual information in nats. Never clipped: a negative value is reported as it is.

    A fitted critic gains on the samples that it was fitted to and loses on others. For a model of many weak directions,
    n samples and every direction shrunk by c, the gain is sum(c) / n minus what it loses, and the loss at the best c
    is half of their sum. Stopping by validation samples aims at that c. So `value` is the middle of `train_value` and
    `held_out_value`, and rests on both sets of samples; `held_out_value` alone lies below the truth by that loss, and
    is what a lower bound holds for.

    `standard_error` joins two parts. `sampling_error` is that of the middle of both sets. `fit_error` is half of the
    drop from `train_value` to `held_out_value`, plus the sampling error that this half has itself: stopping may have
    been early or late. It is at least what the validation samples can see, 2 over their number. A dependence that the
    critic cannot express shows in neither.
    """

    value: float
    standard_error: float
    sampling_error: float
    fit_error: float
    held_out_value: float
    train_value: float
    ceiling: float  # log of the number of candidates for InfoNCE, else infinite
    warnings: tuple[str, ...]
    history: tuple[dict[str, float], ...]  # step, train and validation objective of the fit, member by member
    estimator: str
    critic: str
    samples: dict[str, int]  # train, validation, held_out
    seconds: float

    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval, value ± 1.96 standard errors."""
        half = _NORMAL_95 * self.standard_error
        return self.value - half, self.value + half

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field and the interval; None for what is not finite."""
        found = asdict(self) | {"interval_95": list(self.interval())}
        return {name: _json(value) for name, value in found.items()}

    def plot(self, axes: Any = None) -> Any:
        """Draws the fit and the held-out value with its interval; returns the matplotlib axes. Needs matplotlib."""
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
    return [_json(v) for v in value] if isinstance(value, list | tuple) else value
