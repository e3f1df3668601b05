"""Settings of FactorCL: what a YAML file says (Settings), and the sizes and choices of the model (FactorCLConfig)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from models.layers.encoders import EncoderConfig
from models.layers.sequence import check_choice, check_positive

PRESETS = ("recommended", "public-code", "paper")


@dataclass(frozen=True)
class FactorCLConfig:
    """The choices on which the paper and its public code differ. The defaults have the public code's sizes.

    FactorCLConfig() reproduces the public synthetic model's parameter counts: 4,039,686 (SUP, 20 classes) and
    4,411,398 (SSL). ``recommended()`` and ``paper()`` change what their docstrings say.

    critic_hidden: code (512, 512); the paper says one hidden layer, (512,).
    head_layers: synthetic code 1, two hidden layers; paper and the code for real data 0, one hidden layer.
    label: how y enters I(Xi;Y): code "scalar", the class number as one column; "one_hot" has no false order.
    condition_sides: where the label enters I(X1;X2|Y): the synthetic code "first"; its other models and the
        paper "both".
    ssl_club_condition: "augmented" (x' as in the paper, default); "repeated" is a defect of the synthetic
        code, which concatenates head(x) with itself.
    conditional_negatives: code "batch" (the condition is only concatenated); paper, eq. 13-14 "label",
        negatives of the same class (SUP only).
    anchor: code "second"; the paper's eq. 10 anchors the first modality, "first".
    u_terms_weight: 1.0 in code and eq. 96/99; 2.0 counts the two terms once for U1 and once for U2, as
        Algorithm 2 does.
    club_critic: code and Algorithm 3 "own", each CLUB term has a critic of its own; "shared" takes that of the
        InfoNCE term of the same pair (section 3's f* "for free"). Heads stay apart. A shared critic is stepped in
        the inner loop alone, by InfoNCE on the heads of both terms.
    """

    num_classes: int = 2
    feature_dims: tuple[int, int] = (128, 128)
    critic_hidden: tuple[int, ...] = (512, 512)
    head_layers: int = 1
    activation: str = "relu"
    label: str = "scalar"
    condition_sides: str = "first"
    ssl_club_condition: str = "augmented"
    conditional_negatives: str = "batch"
    anchor: str = "second"
    u_terms_weight: float = 1.0
    club_critic: str = "own"

    def __post_init__(self) -> None:
        choices = {
            "label": ("scalar", "one_hot"),
            "condition_sides": ("first", "both"),
            "anchor": ("first", "second"),
            "ssl_club_condition": ("augmented", "repeated"),
            "conditional_negatives": ("batch", "label"),
            "club_critic": ("own", "shared"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")

    def recommended(self) -> FactorCLConfig:
        """The code's sizes with one-hot labels, on both sides of the condition."""
        return replace(self, label="one_hot", condition_sides="both")

    def paper(self) -> FactorCLConfig:
        """The paper's text: shallow critics and heads, anchors of the first modality, negatives within the class."""
        return replace(
            self.recommended(),
            critic_hidden=self.critic_hidden[:1],
            head_layers=0,
            anchor="first",
            conditional_negatives="label",
        )

    @property
    def label_width(self) -> int:
        return 1 if self.label == "scalar" else self.num_classes


@dataclass(frozen=True)
class Settings:
    """What a YAML file says under ``model``; FactorCLConfig has the choices behind a preset.

    preset: "recommended" (one-hot labels on both sides of the condition), "public-code" or "paper".
    head_layers: hidden layers - 1 of every head: the public synthetic code has 1, its code for real data 0.
    inner_steps: steps of the CLUB critics per batch.
    inner_batch: they see the "same" batch as the outer step (most of the public code), or a "fresh" one drawn from the
        training rows (Algorithm 3; the synthetic code draws it from all rows, which is not offered).
    critic_lr: of the CLUB critics; None for the training's.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    preset: str = "recommended"
    critic_hidden: int = 512
    head_layers: int = 1
    club_critic: str = "own"
    inner_steps: int = 1
    inner_batch: str = "same"
    critic_lr: float | None = None

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        check_choice("club_critic", self.club_critic, ("own", "shared"))
        check_choice("inner_batch", self.inner_batch, ("same", "fresh"))
        check_positive(critic_hidden=self.critic_hidden)
        for name in ("inner_steps", "head_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.club_critic == "shared" and self.inner_steps < 1:
            raise ValueError("a shared club_critic learns in the inner steps alone: inner_steps must be at least 1")

    def architecture(self, num_classes: int) -> FactorCLConfig:
        found = FactorCLConfig(
            num_classes=num_classes,
            feature_dims=(self.encoder.out_dim, self.encoder.out_dim),
            critic_hidden=(self.critic_hidden, self.critic_hidden),
            head_layers=self.head_layers,
        )
        chosen = {"recommended": found.recommended, "paper": found.paper, "public-code": lambda: found}
        return replace(chosen[self.preset](), club_critic=self.club_critic)
