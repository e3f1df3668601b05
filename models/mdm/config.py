"""Settings of the dependency penalty."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.baselines.fusion import MFNSettings
from models.layers.sequence import check_choice, check_positive
from models.model import Nested


@dataclass(frozen=True)
class Settings:
    """base: the model to train, by name or with its settings.

    weight: lambda, the weight of the measure, which is maximised. With 0 the base trains as without the penalty, bit
        for bit, and the critic is trained in addition.
    measure: "kl" (Donsker-Varadhan), "f" (NWJ) or "wasserstein" (with weight ``penalty`` of the gradient penalty).
    input: the input of the critic: the "fused" representation, or the "triple" of concatenated unimodal vectors.
    representation: name of the fused representation, for bases that are not networks with a head.
    lengths: of shuffled sequences. "kept": a modality from another row is cut to the length of the row, or repeated
        from its start if it is too short, so that padding carries no information. "moved": it keeps its own length and
        padding.
    negatives: shuffled rows per row of the batch, at most 1. They determine the cost of the penalty: 1/8 adds about a
        fifth to a step of MFN, 1/4 three tenths, and 1 doubles it. There are at least four of them (or the whole batch,
        if it is smaller), since "kl" is not reliable above the log of their number, 1.4 nats for four; batches of fewer
        than 32 rows therefore pay for more than 1/8.
    critic_steps: number of critic steps per batch, K. fresh: draw a new batch for each of them instead of reusing the
        codes of the main step.
    critic_lr: of the critic's AdamW. hidden: widths of its layers. clamp: largest |score| of "kl" and "f", 0 for no
        limit.
    bound: normalisation of the critic's input: "norm" (LayerNorm without weights), "none", or "auto", which is "norm"
        for "wasserstein", whose value grows with the scale of a representation, and "none" otherwise.
    balance: limits the norm of the penalty's gradient to that of the task's gradient, in the "fused" representation (at
        no cost) or in all "parameters" (one more backward pass of the base); "none" does not limit it. For a triple
        whose vectors are not computed from the fused representation, the gradients of the parameters are compared.
    ramp: fraction of the training over which the weight rises from 0.
    control: "same" permutes all modalities alike, "random" keeps an untrained critic. Gains with these controls are not
        due to dependence.
    """

    base: Nested = field(default_factory=lambda: Nested("mfn", MFNSettings()))
    weight: float = 0.1
    measure: str = "kl"
    input: str = "fused"
    representation: str = "fused"
    lengths: str = "kept"
    negatives: float = 0.125
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
