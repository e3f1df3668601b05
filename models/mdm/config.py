"""Settings of the dependency penalty."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.baselines.fusion import MFNSettings
from models.layers.sequence import check_choice, check_positive
from models.model import Nested


@dataclass(frozen=True)
class Settings:
    """base: the model that is trained, by name or with its settings; it stays as it is.

    weight: lambda, of the measure that is maximised. 0 trains the base alone, bit for bit, and the critic beside it.
    measure: "kl" (Donsker-Varadhan), "f" (NWJ) or "wasserstein" (with a gradient penalty of ``penalty``).
    input: what the critic sees, the "fused" representation or the "triple" of unimodal parts, side by side.
    representation: name of the fused representation, for bases that are no network with a head.
    lengths: of shuffled sequences. "kept": a modality of another row is cut to the row's own length, or starts again
        where it is too short, so that padding tells nothing. "moved": it brings its own length and padding along.
    negatives: shuffled rows per row of the batch, at most 1, and two at least. They are what the penalty costs: a
        quarter adds about a quarter to a step, 1 doubles it. "kl" is not to be trusted above the log of their number.
    critic_steps: K. fresh: every one of them on a batch of its own; otherwise all on the codes of the main step.
    critic_lr: of the critic's AdamW. hidden: widths of its layers. clamp: largest |score| of "kl" and "f", 0 for none.
    bound: what the critic's input goes through: "norm" (LayerNorm without weights), "none", or "auto": "norm" for
        "wasserstein", whose value grows with the scale of a representation, "none" for the other two.
    balance: the penalty's gradient is cut to the length of the task's, in the "fused" representation (free) or in all
        "parameters" (one more backward pass of the base); "none": never. A triple whose parts are not read off the
        fused representation is compared in the parameters.
    ramp: share of the training over which the weight rises from 0.
    control: "same" moves all modalities by one permutation, "random" keeps an untrained critic: what is gained with
        these is not due to dependence.
    """

    base: Nested = field(default_factory=lambda: Nested("mfn", MFNSettings()))
    weight: float = 0.1
    measure: str = "kl"
    input: str = "fused"
    representation: str = "fused"
    lengths: str = "kept"
    negatives: float = 0.25
    critic_steps: int = 1
    fresh: bool = False
    critic_lr: float = 1e-4
    hidden: tuple[int, ...] = (256, 256)
    clamp: float = 20.0
    penalty: float = 10.0
    bound: str = "auto"
    balance: str = "fused"
    ramp: float = 0.1
    control: str = "none"

    def __post_init__(self) -> None:
        check_choice("measure", self.measure, ("kl", "f", "wasserstein"))
        check_choice("input", self.input, ("fused", "triple"))
        check_choice("lengths", self.lengths, ("kept", "moved"))
        check_choice("bound", self.bound, ("auto", "norm", "none"))
        check_choice("balance", self.balance, ("fused", "parameters", "none"))
        check_choice("control", self.control, ("none", "same", "random"))
        check_positive(critic_steps=self.critic_steps, hidden=min(self.hidden, default=1))
        for name in ("weight", "clamp", "penalty"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, low in (("negatives", self.negatives <= 0), ("ramp", self.ramp < 0)):
            if low or not getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not self.critic_lr > 0:
            raise ValueError(f"critic_lr must be positive, got {self.critic_lr}")
