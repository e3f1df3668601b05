"""Settings of MIRD: what a YAML file says under ``model``."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.layers.mult import MulTConfig
from models.layers.sequence import check_choice, check_positive
from models.layers.text import TextConfig
from models.layers.transformer import check_rate

AGNOSTIC = ("auto", "wsa", "wa", "mag", "mult", "transformer")
OF_TEXT = ("wsa", "wa", "mag")
LADDER = ("agnostic", "reconstruction", "mi", "unlabelled")
QUIRKS = {
    "random_encoder": "the agnostic text encoder starts from random weights although text.name names a checkpoint",
    "text_padding": "the specific text encoder attends to padding",
    "token_padding": "the cross entropy of words counts padding",
    "frame_padding": "LSTMs, the words' attention and the squared errors run on over padded frames",
    "unbounded_mi": "CLUB is followed downward below 0",
    "club_range": "log-variances of CLUB lie in (-1, 1)",
    "bare_log": "the logarithms of the losses have no floor",
    "fresh_codes": "every estimator step encodes anew, with dropout of its own",
}


@dataclass(frozen=True)
class Settings:
    """Sizes are the public code's; what it does to padding, and other quirks, is off unless ``as_published`` names it.

    agnostic: the encoder of all modalities at once. With text: BERT on words shifted by what they find in the other
        modalities, by sparsemax ("wsa") or softmax ("wa") attention, or by neighbours in time ("mag"). Without: "mult"
        (data of two modalities or more) or one "transformer" over all sequences joined. "auto": "wsa" where the data
        has tokens, "mult" otherwise, "transformer" for one modality.
    text: the text encoder, used twice with weights of its own each time. language: the specific encoder of text, that
        ("bert") or an LSTM ("lstm"). text_modality: which tokens are the text, the first ones by default; other tokens
        are embedded and treated as frames.
    sizes: of "mult"; "transformer" takes its dim, heads, layers and dropouts.
    dim: of every code z. embedding: of tokens that an LSTM reads. stride: averages this many neighbouring frames first;
        decoders then give those averages.
    dropout: before the linear layer to z of text encoders, in the shift, and in the head. beta: bound of the shift.
    key_bias: keeps a bias of the shift's attention that cannot have an effect, to count the public code's parameters.
    ladder: how much of the model is there. "agnostic" z_S of 2 dim and a head; "reconstruction" adds specific codes and
        decoders, "mi" the CLUB terms, "unlabelled" the rows without a label.
    loss: "log-sum", sum of log losses plus MI; or "weighted", prediction + sum of weighted reconstructions + MI.
    prediction: of a regression target, "mse" (the paper's) or "l1".
    reconstruction: weights by modality of "weighted", 1 where none is given.
    mi_weight: of every CLUB term; mi_weights: factors of single ones, by "agnostic-NAME" and "NAME-NAME".
    club_hidden: width of the estimators' networks (the public code halves its 32). inner_steps: of the estimators per
        batch, with Adam at ``club_lr``.
    log_floor: below it the logarithm of a loss goes on as its tangent, so that a loss of 0 is finite.
    as_published: quirks of the public code that change numbers, by name; "all" for all of them.
    """

    agnostic: str = "auto"
    text: TextConfig = field(default_factory=TextConfig)
    language: str = "bert"
    text_modality: str = ""
    sizes: MulTConfig = field(default_factory=lambda: MulTConfig(dim=32, heads=4, layers=2))
    dim: int = 64
    embedding: int = 128
    stride: int = 1
    dropout: float = 0.5
    beta: float = 1.0
    key_bias: bool = False
    ladder: str = "unlabelled"
    loss: str = "log-sum"
    prediction: str = "mse"
    reconstruction: dict[str, float] = field(default_factory=dict)
    mi_weight: float = 1.0
    mi_weights: dict[str, float] = field(default_factory=dict)
    club_hidden: int = 16
    inner_steps: int = 5
    club_lr: float = 1e-3
    log_floor: float = 1e-3
    as_published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("agnostic", self.agnostic, AGNOSTIC)
        check_choice("language", self.language, ("bert", "lstm"))
        check_choice("ladder", self.ladder, LADDER)
        check_choice("loss", self.loss, ("log-sum", "weighted"))
        check_choice("prediction", self.prediction, ("mse", "l1"))
        for quirk in self.as_published:
            check_choice("as_published", quirk, (*QUIRKS, "all"))
        check_positive(
            dim=self.dim,
            embedding=self.embedding,
            stride=self.stride,
            club_hidden=self.club_hidden,
            inner_steps=self.inner_steps,
        )
        check_rate("dropout", self.dropout)
        for name in ("beta", "mi_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("reconstruction", "mi_weights"):
            for key, value in getattr(self, name).items():
                if not value >= 0:
                    raise ValueError(f"{name} of {key} must not be negative, got {value}")
        if self.reconstruction and self.loss == "log-sum":
            raise ValueError("reconstruction holds weights of loss=weighted; log-sum has none")
        for name in ("club_lr", "log_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def published(self, quirk: str) -> bool:
        """Whether the public code's form of ``quirk`` is asked for."""
        return quirk in self.as_published or "all" in self.as_published

    def has(self, rung: str) -> bool:
        """Whether the ladder reaches ``rung``."""
        return LADDER.index(self.ladder) >= LADDER.index(rung)
