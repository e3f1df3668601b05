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
    "frame_padding": "LSTMs, word attention and squared errors include padded frames",
    "unbounded_mi": "CLUB is minimised even below 0",
    "club_range": "log-variances of CLUB are limited to (-1, 1)",
    "bare_log": "the logarithms of the losses have no lower limit",
    "fresh_codes": "every estimator step encodes the batch again, with new dropout",
}


@dataclass(frozen=True)
class Settings:
    """Sizes are those of the public code. Its treatment of padding and other quirks are off unless ``as_published``
    names them.

    agnostic: the encoder of all modalities together. With text it is BERT on words that are shifted by the other
        modalities, with sparsemax ("wsa") or softmax ("wa") attention, or by frames at the same time ("mag"). Without
        text it is "mult" (two or more modalities) or one "transformer" over the concatenated sequences. "auto" is "wsa"
        if the data has tokens, "transformer" for one modality, otherwise "mult".
    text: the text encoder, used twice with separate weights. language: the specific encoder of text, "bert" (that
        encoder) or "lstm". text_modality: the name of the tokens that are the text, by default the first; other tokens
        are embedded and treated as frames.
    sizes: of "mult"; "transformer" uses its dim, heads, layers and dropouts.
    dim: width of every code z. embedding: width of token embeddings for an LSTM. stride: average this many neighbouring
        frames first; decoders then reconstruct the averages.
    dropout: before the linear layer to z of text encoders, in the shift and in the head. beta: bound of the shift.
    key_bias: keep a bias in the shift's attention that has no effect, to match the parameter count of the public code.
    ladder: how much of the model to use. "agnostic": z_S of width 2 dim and a head. "reconstruction" adds specific
        codes and decoders, "mi" adds the CLUB terms, "unlabelled" adds rows without a label.
    loss: "log-sum" is the sum of log losses plus MI; "weighted" is prediction + sum of weighted reconstructions + MI.
    prediction: loss of a regression target, "mse" (the paper) or "l1".
    reconstruction: weights by modality for "weighted", 1 by default.
    mi_weight: of every CLUB term; mi_weights: factors of single terms, by "agnostic-NAME" and "NAME-NAME".
    club_hidden: width of the estimators' networks (the public code halves its 32). inner_steps: steps of the estimators
        per batch, with Adam and learning rate ``club_lr``.
    log_floor: below it the logarithm of a loss is continued by its tangent, so that a loss of 0 is finite.
    as_published: names of quirks of the public code to reproduce; "all" for all.
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
        """Whether to reproduce this quirk of the public code."""
        return quirk in self.as_published or "all" in self.as_published

    def has(self, rung: str) -> bool:
        """Whether ``ladder`` includes ``rung``."""
        return LADDER.index(self.ladder) >= LADDER.index(rung)
