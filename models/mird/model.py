"""MIRD (arXiv 2409.12408): one modality-agnostic code, a specific code per modality, CLUB between all pairs of codes.

    z_S = agnostic(x_1 .. x_M),   z_m = specific_m(x_m),   x^_m = decoder_m([z_S; z_m]),   y^ = head([z_S; z_1 .. z_M])
    L = log L_pred + sum_m log L_m + sum_{m < n} I(z_m; z_n) + sum_m I(z_S; z_m)

L_m is the mean squared error of frames, or the mean cross entropy of words. I is CLUB with an estimator q(z_b | z_a)
per pair (a, b), which is trained for ``inner_steps`` steps per batch on codes that are encoded once without gradient.
Rows without a label are used in all terms except L_pred. We follow the released code, except for the quirks in
``config.QUIRKS``, which are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.baselines.supervised import outputs_of
from models.batch import Batch, Inputs
from models.data.dataset import Dataset
from models.layers.decoders import decoded_states, sequence_errors, token_cross_entropy
from models.layers.dropout import Dropout
from models.layers.inlet import Inlet
from models.layers.prediction import Scale
from models.layers.sequence import LSTMDecoder
from models.mird.config import Settings
from models.mird.encoders import agnostic_encoder, specific_encoder, text_of
from models.model import Loss, Model, OptimizerConfig, Phase
from models.shares import by_rows

AGNOSTIC = "agnostic"


class Pairs(NamedTuple):
    """Both sides of every pair of codes, [P, B, dim] each; q(second | first)."""

    first: Tensor
    second: Tensor


class MIRD(Model):
    """A model of any number of modalities, of sequences, vectors and at most one text that BERT reads.

    Representations: "z_S" and "z_NAME" of every modality, [B, dim] each, and "fused", all of them side by side.
    Terms of the loss: "prediction" (cross entropy in nats, or the error of the standardised target),
    "reconstruction_NAME" (nats a word, or squared error), "mi_A_B" (CLUB, nats). Validation rows are scored with the
    prediction loss only, as in the paper's model selection. Training uses only rows that have every modality.
    """

    headline = "head"

    def __init__(self, config: Settings, data: Dataset):
        super().__init__()
        self.config, self.names = config, data.names
        self.specific_codes = config.has("reconstruction")
        text = text_of(data, config)
        width = config.dim if self.specific_codes else 2 * config.dim
        shifted = text is not None and config.agnostic in ("auto", "wsa", "wa", "mag")
        self.text = text.name if text is not None and shifted else ""
        self.seen = tuple(m.name for m in data.modalities if m.name != self.text)
        # BERT embeds its own words, so they need no inlet.
        self.inlet = Inlet([data[name] for name in self.seen], config.embedding, config.stride)
        dims = dict(zip(self.seen, self.inlet.dims, strict=True))
        self.agnostic, self.reads_text = agnostic_encoder(data, [dims.get(n, 0) for n in data.names], config, width)
        unknown = [name for name in config.reconstruction if name not in data.names]
        if unknown:
            raise ValueError(f"reconstruction must be of {', '.join(data.names)}; got {unknown[0]!r}")
        scale = Scale(data, config.prediction)
        self.scale = scale
        inside = width
        if self.specific_codes:
            inside = config.dim * (1 + len(data.names))
            self._build_specific(data, config, dims)
        hidden = config.dim
        self.head = nn.Sequential(
            nn.Linear(inside, hidden), nn.ReLU(), Dropout(config.dropout), nn.Linear(hidden, outputs_of(data.target))
        )
        if config.has("mi"):
            self._build_pairs(config)

    def _build_specific(self, data: Dataset, config: Settings, dims: dict[str, int]) -> None:
        encoders, decoders = {}, {}
        for modality in data.modalities:
            dim = dims.get(modality.name, 0)
            if modality.is_tokens:
                dim = modality.dim or config.embedding
            encoders[modality.name] = specific_encoder(modality, dim, config, text_of(data, config))
            out = modality.vocabulary if modality.is_tokens else dim
            decoders[modality.name] = LSTMDecoder(2 * config.dim, out)
        self.specific, self.decoders = nn.ModuleList(encoders.values()), nn.ModuleList(decoders.values())
        self.tokens = tuple(modality.is_tokens for modality in data.modalities)

    def _build_pairs(self, config: Settings) -> None:
        count = len(self.names)
        between = [(m, n) for m in range(1, count + 1) for n in range(m + 1, count + 1)]
        self.pairs = [*between, *((0, m) for m in range(1, count + 1))]
        codes = (AGNOSTIC, *self.names)
        self.pair_names = [f"{codes[a]}-{codes[b]}" for a, b in self.pairs]
        unknown = [name for name in config.mi_weights if name not in self.pair_names]
        if unknown:
            raise ValueError(f"mi_weights must be of {', '.join(self.pair_names)}; got {unknown[0]!r}")
        weights = torch.tensor([config.mi_weight * config.mi_weights.get(name, 1.0) for name in self.pair_names])
        self.register_buffer("mi_weights", weights, persistent=False)
        bound = 1.0 if config.published("club_range") else 6.0
        self.club = mk.CLUB(config.dim, config.dim, config.club_hidden, logvar_bound=bound, groups=len(self.pairs))

    mi_weights: Tensor

    def sequences(self, batch: Batch) -> dict[str, Inputs]:
        """The encoder inputs of every modality: tokens for the text, sequences for the others."""
        found = dict(zip(self.seen, self.inlet(batch.inputs), strict=True))
        return {name: batch.inputs[name] if name == self.text else found[name] for name in self.names}

    @by_rows
    def encoded(self, batch: Batch, sequences: dict[str, Inputs]) -> list[Tensor]:
        """z_S and, unless ladder is "agnostic", z_m in the order of the data."""
        if self.reads_text:
            others = [sequences[name] for name in self.seen]
            agnostic = self.agnostic(sequences[self.text], others)
        else:
            agnostic = self.agnostic(*(sequences[name] for name in self.names))
        if not self.specific_codes:
            return [agnostic]
        own = [batch.inputs[name] if is_tokens else sequences[name] for name, is_tokens in self._kinds()]
        return [agnostic, *(encoder(x) for encoder, x in zip(self.specific, own, strict=True))]

    def _kinds(self) -> list[tuple[str, bool]]:
        return list(zip(self.names, self.tokens, strict=True))

    def codes(self, batch: Batch) -> list[Tensor]:
        return self.encoded(batch, self.sequences(batch))

    def reconstructions(self, batch: Batch, sequences: dict[str, Inputs], codes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The loss L_m of every modality that is decoded from [z_S; z_m]."""
        starts = [torch.cat([codes[0], z], 1) for z in codes[1:]]
        aims = [batch.inputs[name] if is_tokens else sequences[name] for name, is_tokens in self._kinds()]
        states = self._decoded(starts, [x.values.shape[1] for x in aims])
        found = {}
        for (name, is_tokens), decoder, h, x in zip(self._kinds(), self._decoders(), states, aims, strict=True):
            if is_tokens:
                aim = Inputs(x.values) if self.config.published("token_padding") else x
                found[name] = token_cross_entropy(h, decoder.out, aim)
            else:
                found[name] = sequence_errors(decoder.out(h), x, padding=self.config.published("frame_padding"))
        return found

    def _decoders(self) -> list[LSTMDecoder]:
        return [cast(LSTMDecoder, decoder) for decoder in self.decoders]

    @by_rows
    def _decoded(self, starts: Sequence[Tensor], steps: Sequence[int]) -> list[Tensor]:
        return decoded_states(self._decoders(), starts, steps)

    def sides(self, codes: Sequence[Tensor]) -> Pairs:
        """Every pair of codes as one group of the grouped estimator."""
        stacked = torch.stack(list(codes))
        first, second = (stacked[[pair[side] for pair in self.pairs]] for side in (0, 1))
        return Pairs(first, second)

    def information(self, codes: Sequence[Tensor]) -> Tensor:
        """CLUB of every pair in nats, [P]; without a gradient below 0 unless ``unbounded_mi`` is set."""
        found = self.club(*self.sides(codes))
        return found if self.config.published("unbounded_mi") else found.clamp(min=0)

    def loss(self, batch: Batch) -> Loss:
        sequences = self.sequences(batch)
        codes = self.encoded(batch, sequences)
        prediction = self._prediction(batch, codes)
        if not self.training and prediction is not None:
            return Loss.of({"prediction": prediction})
        terms: dict[str, Tensor] = {} if prediction is None else {"prediction": prediction}
        if not self.specific_codes:
            return Loss.of(terms)
        terms |= {f"reconstruction_{name}": x for name, x in self.reconstructions(batch, sequences, codes).items()}
        total = self._combined(terms)
        if self.config.has("mi"):
            information = self.information(codes)
            total = total + (information * self.mi_weights).sum()
            labels = (f"mi_{name.replace('-', '_')}" for name in self.pair_names)
            terms |= dict(zip(labels, information, strict=True))
        return Loss(total, {name: value.detach() for name, value in terms.items()})

    def _combined(self, terms: dict[str, Tensor]) -> Tensor:
        if self.config.loss == "log-sum":
            floor = 0.0 if self.config.published("bare_log") else self.config.log_floor
            return torch.stack([log_above(value, floor) for value in terms.values()]).sum()
        weights = {f"reconstruction_{name}": weight for name, weight in self.config.reconstruction.items()}
        return Loss.of(terms, weights).total

    def _prediction(self, batch: Batch, codes: Sequence[Tensor]) -> Tensor | None:
        """L_pred over the rows with a label; None if there are none."""
        if batch.target is None:
            return None
        fused, target = torch.cat(list(codes), 1), batch.target
        if batch.labelled is not None:
            if not bool(batch.labelled.any()):
                return None
            fused, target = fused[batch.labelled], target[batch.labelled]
        return self.scale.loss(self.head(fused), target)

    def learning_loss(self, pairs: Pairs) -> Loss:
        """The loss of the estimators: their negative log-likelihood in nats, summed over the pairs."""
        return Loss.of({"club": self.club.learning_loss(*pairs).sum()})

    def fixed(self, batch: Batch) -> Pairs:
        """The codes that all estimator steps of a batch use."""
        return self.sides(self.codes(batch))

    def _encoding_anew(self, batch: Batch) -> Loss:
        with torch.no_grad():
            pairs = self.fixed(batch)
        return self.learning_loss(pairs)

    def phases(self) -> list[Phase]:
        estimators = list(self.club.parameters()) if self.config.has("mi") else []
        mine = {id(parameter) for parameter in estimators}
        main = [p for p in self.parameters() if p.requires_grad and id(p) not in mine]
        usable = Batch.complete if self.config.has("unlabelled") else Batch.complete_with_labels
        phases = [Phase("main", main, self.loss, usable=usable)]
        if estimators:
            steps, optimizer = self.config.inner_steps, OptimizerConfig(self.config.club_lr, 0.0)
            anew = self.config.published("fresh_codes")
            loss, fixed = (self._encoding_anew, None) if anew else (self.learning_loss, self.fixed)
            phases.append(Phase("club", estimators, loss, steps, optimizer, fixed, usable=usable))
        return phases

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        codes = self.codes(batch)
        names = ("z_S", *(f"z_{name}" for name in self.names))
        return dict(zip(names, codes, strict=False)) | {"fused": torch.cat(codes, 1)}

    def predict(self, batch: Batch) -> Tensor:
        return self.scale.predicted(self.head(torch.cat(self.codes(batch), 1)))


def log_above(value: Tensor, floor: float) -> Tensor:
    """log(value), continued below ``floor`` by its tangent value / floor - 1 + log(floor)."""
    if not floor:
        return value.log()
    return torch.where(value > floor, value.clamp(min=floor).log(), value / floor - 1 + math.log(floor))


def build(config: Settings, data: Dataset) -> MIRD:
    return MIRD(config, data)
