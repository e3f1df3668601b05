"""Settings of FactorCL: those of a YAML file (Settings), and the sizes and choices of the model (FactorCLConfig)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from models.factorcl.critics import CRITICS
from models.layers.encoders import EncoderConfig
from models.layers.sequence import check_choice, check_positive

PRESETS = ("recommended", "public-code", "paper")
MAXIMISED = ("infonce_x1x2", "infonce_x1y", "infonce_x2y", "infonce_x1x2_cond")
MINIMISED = ("club_x1x2_cond", "club_x1x2")
TERMS = (*MAXIMISED, *MINIMISED)
SAME_PAIR = {"club_x1x2": "infonce_x1x2", "club_x1x2_cond": "infonce_x1x2_cond"}
# The terms that each ablation keeps (the bounds of S, U1 and U2 are eq. 8-9).
OBJECTIVES = {
    "all": TERMS,
    "S": ("infonce_x1x2", "club_x1x2_cond"),
    "U1": ("infonce_x1y", "infonce_x1x2_cond", "club_x1x2"),
    "U2": ("infonce_x2y", "infonce_x1x2_cond", "club_x1x2"),
    "no-upper-bounds": MAXIMISED,
    "own-terms": ("infonce_x1y", "infonce_x2y"),
}


HEADS = ("term", "factor")


@dataclass(frozen=True)
class Choices:
    """The settings that Settings and FactorCLConfig share.

    club_critic: "own" (the code and Algorithm 3) gives each CLUB term its own critic. "shared" uses the critic of the
        InfoNCE term of the same pair (section 3's f* "for free"), with separate heads. A shared critic is trained only
        in the inner loop, by InfoNCE on the heads of both terms.
    critic: of every term: "concat" (published) is an MLP on the pair. "cosine" and "dot" are inner products of linear
        projections to ``critic_dim``, divided by ``temperature``; "cosine" normalises the projections. critics: of
        single terms, {term: critic}.
    club_floor: CLUB estimates below it are not minimised further; None always minimises, as published. Mutual
        information is never negative, so an upper bound below 0 means that its critic does not fit.
    club_weight: weight of the two CLUB terms in the objective.
    objective: the terms, a key of OBJECTIVES; all except "all" are ablations. without: terms to remove.
    heads: "term" (published) gives every term its own head. "factor" gives each of the factors S and U one head for all
        its terms. With its own head, a CLUB term can decrease without changing the representations of other terms.
    """

    critic: str = "concat"
    critics: dict[str, str] = field(default_factory=dict)
    critic_dim: int = 64
    temperature: float = 0.1
    club_critic: str = "own"
    club_floor: float | None = None
    club_weight: float = 1.0
    objective: str = "all"
    without: tuple[str, ...] = ()
    heads: str = "term"

    def __post_init__(self) -> None:
        check_terms(self)

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(term for term in OBJECTIVES[self.objective] if term not in self.without)

    def critic_of(self, term: str) -> str:
        return self.critics.get(term, self.critic)

    def chosen(self) -> dict[str, Any]:
        """The fields of Choices and their values."""
        return {f.name: getattr(self, f.name) for f in fields(Choices)}


@dataclass(frozen=True)
class FactorCLConfig(Choices):
    """Choices on which the paper and its public code differ. The defaults have the sizes of the public code.

    FactorCLConfig() reproduces the parameter counts of the public synthetic model: 4,039,686 (SUP, 20 classes) and
    4,411,398 (SSL). The docstrings of ``recommended()`` and ``paper()`` say what they change.

    critic_hidden: code (512, 512); the paper says one hidden layer, (512,).
    head_layers: synthetic code 1, two hidden layers; paper and the code for real data 0, one hidden layer.
    label: how y enters I(Xi;Y): "scalar" (code) is the class number as one column; "one_hot" does not impose an order.
    condition_sides: which inputs of I(X1;X2|Y) the label is concatenated to: "first" (synthetic code) or "both" (other
        models of the code, and the paper).
    ssl_club_condition: "augmented" (x' as in the paper, default); "repeated" is a defect of the synthetic
        code, which concatenates head(x) with itself.
    conditional_negatives: code "batch" (the condition is only concatenated); paper, eq. 13-14 "label",
        negatives of the same class (SUP only).
    anchor: code "second"; the paper's eq. 10 anchors the first modality, "first".
    u_terms_weight: 1.0 in code and eq. 96/99; 2.0 counts the two terms once for U1 and once for U2, as
        Algorithm 2 does.
    The other fields: see Choices.
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

    def __post_init__(self) -> None:
        choices = {
            "label": ("scalar", "one_hot"),
            "condition_sides": ("first", "both"),
            "anchor": ("first", "second"),
            "ssl_club_condition": ("augmented", "repeated"),
            "conditional_negatives": ("batch", "label"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        super().__post_init__()

    def recommended(self) -> FactorCLConfig:
        """The sizes of the code with one-hot labels, concatenated to both sides of the conditional terms."""
        return replace(self, label="one_hot", condition_sides="both")

    def paper(self) -> FactorCLConfig:
        """The settings of the paper's text: one hidden layer, the first modality as the anchor, negatives within the
        class."""
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
class Settings(Choices):
    """The keys under ``model`` in a YAML file. FactorCLConfig has the choices that a preset sets.

    preset: "recommended" (one-hot labels on both sides of the conditional terms), "public-code" or "paper".
    critic_hidden: width of the concat critics.
    head_layers: number of hidden layers of every head minus 1. The public synthetic code has 1, its code for real data
        0.
    inner_steps: steps of the CLUB critics per batch.
    inner_batch: the batch of the inner steps: "same" as the outer step (most of the public code), or "fresh" training
        rows (Algorithm 3; the synthetic code draws from all rows, which is not offered).
    critic_lr: learning rate of the CLUB critics; None uses the training settings.
    conditional_negatives: see FactorCLConfig; empty uses the preset. For the other fields see Choices.
    representation: the representation in summary tables: "full" is the concatenation of all heads; "encoder" is the
        encoder outputs, the paper's ablation without factorization ("OurCL").
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    preset: str = "recommended"
    critic_hidden: int = 512
    head_layers: int = 1
    inner_steps: int = 1
    inner_batch: str = "same"
    critic_lr: float | None = None
    conditional_negatives: str = ""
    representation: str = "full"

    def __post_init__(self) -> None:
        check_choice("representation", self.representation, ("full", "encoder"))
        check_choice("conditional_negatives", self.conditional_negatives, ("", "batch", "label"))
        super().__post_init__()
        check_choice("preset", self.preset, PRESETS)
        check_choice("inner_batch", self.inner_batch, ("same", "fresh"))
        check_positive(critic_hidden=self.critic_hidden)
        for name in ("inner_steps", "head_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.critic_lr is not None and not 0 < self.critic_lr < math.inf:
            raise ValueError(f"critic_lr must be positive and finite or none, got {self.critic_lr}")
        if self.club_critic == "shared" and self.inner_steps < 1:
            raise ValueError("a shared club_critic is trained only in the inner steps: inner_steps must be at least 1")

    def architecture(self, num_classes: int) -> FactorCLConfig:
        found = FactorCLConfig(
            num_classes=num_classes,
            feature_dims=(self.encoder.out_dim, self.encoder.out_dim),
            critic_hidden=(self.critic_hidden, self.critic_hidden),
            head_layers=self.head_layers,
        )
        chosen = {"recommended": found.recommended, "paper": found.paper, "public-code": lambda: found}
        changes = self.chosen()
        if self.conditional_negatives:
            changes["conditional_negatives"] = self.conditional_negatives
        return replace(chosen[self.preset](), **changes)


def check_terms(config: Choices) -> None:
    """Raises ValueError, naming the setting, for critics, weights and terms that do not exist."""
    check_choice("critic", config.critic, CRITICS)
    check_choice("club_critic", config.club_critic, ("own", "shared"))
    check_choice("heads", config.heads, HEADS)
    check_choice("objective", config.objective, tuple(OBJECTIVES))
    for term in config.without:
        check_choice("without", term, TERMS)
    if not config.terms:
        raise ValueError(f"without leaves no term of objective {config.objective!r}, got {', '.join(config.without)}")
    for term, kind in config.critics.items():
        check_choice("critics", term, TERMS)
        check_choice(f"critics.{term}", kind, CRITICS)
    check_positive(critic_dim=config.critic_dim)
    if not 0 < config.temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {config.temperature}")
    if not 0 <= config.club_weight < math.inf:
        raise ValueError(f"club_weight must be finite and not negative, got {config.club_weight}")
    if config.club_floor is not None and not math.isfinite(config.club_floor):
        raise ValueError(f"club_floor must be a finite number or none, got {config.club_floor}")
    if config.club_critic == "shared":
        for club, infonce in SAME_PAIR.items():
            kinds = [config.critics.get(term, config.critic) for term in (club, infonce)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"critics of {club} and {infonce} must agree when they share one, got {kinds}")
        if len(config.terms) < len(TERMS):
            raise ValueError("a shared club_critic needs all terms: objective must be \"all\" and without empty")
