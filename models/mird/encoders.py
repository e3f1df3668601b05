"""MIRD's encoders: the modality-agnostic ones (all modalities to z_S) and the specific ones (one modality to z_m)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.data.dataset import Dataset, Modality
from models.layers.attention import Visible
from models.layers.dropout import Dropout
from models.layers.encoders import Embedding
from models.layers.lengths import mean_over_steps, sequence, steps_within
from models.layers.mag import AdaptationGate, beside
from models.layers.mult import CrossModal, MulTConfig
from models.layers.sequence import LSTMEncoder
from models.layers.text import TextEncoder, no_tokens
from models.layers.transformer import TransformerStack, run_together, sinusoids
from models.layers.word_shift import WordShift
from models.mird.config import OF_TEXT, Settings


class ShiftedText(nn.Module):
    """A text encoder whose embedded words are shifted by the other modalities: WSA-BERT, WA-BERT and MAG-BERT.

    Tokens and the other modalities' sequences to z_S [B, out_dim]. "mag" has no attention: a word sees the mean of the
    frames of its share of the time, as many parts as the text has tokens.
    """

    def __init__(self, text: Modality, dims: Sequence[int], config: Settings, out_dim: int):
        super().__init__()
        kind = "wsa" if config.agnostic == "auto" else config.agnostic
        random = config.published("random_encoder") and config.text.name
        self.frame_padding = config.published("frame_padding")
        self.text = TextEncoder(text, config.text)
        if random:
            pooler = self.text.backbone.pooler is not None
            self.text.backbone = type(self.text.backbone)(self.text.backbone.config, add_pooling_layer=pooler)
        hidden, rate = self.text.hidden, config.dropout
        self.aligned = kind == "mag"
        self.shift: nn.Module
        if not dims:
            self.shift = nn.Identity()  # without other modalities there is no shift
        elif self.aligned:
            self.shift = AdaptationGate(hidden, dims, config.beta, rate)
        else:
            normalizer = "sparsemax" if kind == "wsa" else "softmax"
            self.shift = WordShift(hidden, dims, config.beta, rate, normalizer=normalizer, key_bias=config.key_bias)
        self.out = nn.Sequential(Dropout(rate), nn.Linear(hidden, out_dim))

    def forward(self, tokens: Inputs, others: Sequence[Inputs]) -> Tensor:
        if self.frame_padding:
            others = [Inputs(x.values) for x in others]

        def shifted(words: Inputs) -> Tensor:
            return self.shift(words, *(beside(words, x) for x in others) if self.aligned else others)

        return self.out(self.text(tokens, shifted if others else None))


class JointTransformer(nn.Module):
    """One transformer over the sequences of all modalities, one after the other: [B, T_m, D_m] each to [B, out_dim].

    Every step is projected to ``dim``, with its position in its own sequence and a learned vector for its modality;
    padding is squeezed out before attention. The mean of all steps is mapped to the output. FLOP as TransformerEncoder.
    """

    def __init__(self, dims: Sequence[int], config: MulTConfig, out_dim: int):
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(dim, config.dim) for dim in dims])
        self.kinds = nn.Parameter(0.02 * torch.randn(len(dims), config.dim))
        self.stack = config.stack(config.dim, config.layers, 0)
        self.positions, self.stack.positions = config.positions, "none"
        self.out = nn.Linear(config.dim, out_dim)

    def forward(self, *inputs: Inputs) -> Tensor:
        parts, here = [], []
        for m, x in enumerate(inputs):
            values, lengths, _ = sequence(f"inputs[{m}]", x)
            h = cast(nn.Linear, self.projections[m])(values) + self.kinds[m]
            if self.positions:
                h = h + sinusoids(h.shape[1], h.shape[2], h)
            parts.append(h)
            whole = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
            here.append(whole if lengths is None else steps_within(lengths, h.shape[1]))
        joined, mask = torch.cat(parts, 1), torch.cat(here, 1)
        order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[..., None]
        lengths = mask.sum(1)
        packed = Inputs(joined.gather(1, order.expand_as(joined))[:, : int(lengths.max())], lengths)
        visible = Visible.between(packed, packed, False)
        states = run_together([cast(TransformerStack, self.stack)], [packed.values], [None], [visible])[0]
        states = states * steps_within(lengths, states.shape[1])[..., None]
        return self.out(mean_over_steps(states, lengths))


class MulTCode(nn.Module):
    """MulT's features of all sequences, and a linear layer to z_S."""

    def __init__(self, dims: Sequence[int], config: MulTConfig, out_dim: int):
        super().__init__()
        self.net = CrossModal(dims, config)
        self.out = nn.Linear(self.net.out_dim, out_dim)

    def forward(self, *inputs: Inputs) -> Tensor:
        return self.out(self.net(*inputs))


class SpecificText(nn.Module):
    """The specific text encoder for z_L: dropout and a linear layer on the pooled output."""

    def __init__(self, text: Modality, config: Settings):
        super().__init__()
        self.text = TextEncoder(text, config.text, padding=config.published("text_padding"))
        self.out = nn.Sequential(Dropout(config.dropout), nn.Linear(self.text.hidden, config.dim))

    def forward(self, x: Inputs) -> Tensor:
        return self.out(self.text(x))


class SpecificSequence(nn.Module):
    """LSTM, last state, linear layer; tokens are embedded first."""

    def __init__(self, modality: Modality, dim: int, config: Settings):
        super().__init__()
        self.embedding = Embedding(modality, config.embedding) if modality.is_tokens else None
        self.padding = config.published("frame_padding")
        self.encoder = LSTMEncoder(dim, config.dim, config.dim)

    def forward(self, x: Inputs) -> Tensor:
        x = x if self.embedding is None else self.embedding(x)
        return self.encoder(Inputs(x.values) if self.padding else x)


def text_of(data: Dataset, config: Settings) -> Modality | None:
    """The text modality, or None. Raises ValueError for a name that is not a token modality of the data."""
    tokens = [modality for modality in data.modalities if modality.is_tokens]
    if config.text_modality:
        found = next((modality for modality in tokens if modality.name == config.text_modality), None)
        if found is None:
            names = ", ".join(modality.name for modality in tokens) or "none"
            raise ValueError(f"text_modality must be tokens of the data, {names}; got {config.text_modality!r}")
        return found
    if not tokens and config.agnostic in OF_TEXT:
        raise no_tokens(f"agnostic={config.agnostic}", data.names, data.name)
    return tokens[0] if tokens else None


def agnostic_encoder(data: Dataset, dims: Sequence[int], config: Settings, out_dim: int) -> tuple[nn.Module, bool]:
    """The agnostic encoder, and whether it takes the tokens of the text separately from the sequences of the others."""
    text = text_of(data, config)
    kind = config.agnostic
    if kind == "auto":
        kind = "wsa" if text is not None else "mult" if len(data.names) > 1 else "transformer"
    if kind in OF_TEXT:
        assert text is not None
        others = [dim for dim, name in zip(dims, data.names, strict=True) if name != text.name]
        return ShiftedText(text, others, replace(config, agnostic=kind), out_dim), True
    if kind == "mult":
        if len(dims) < 2:
            raise ValueError(f"agnostic must be transformer for data of one modality, {data.names[0]}; got {kind}")
        return MulTCode(dims, config.sizes, out_dim), False
    return JointTransformer(dims, config.sizes, out_dim), False


def specific_encoder(modality: Modality, dim: int, config: Settings, text: Modality | None) -> nn.Module:
    if text is not None and modality.name == text.name and config.language == "bert":
        return SpecificText(modality, config)
    return SpecificSequence(modality, dim, config)
