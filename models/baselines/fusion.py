"""Early and late fusion, EF-LSTM, MulT, MFN and LMF as models with a head; any number of modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.baselines.supervised import Supervised, SupervisedSettings, outputs_of
from models.batch import Inputs
from models.data.dataset import Dataset
from models.layers.dropout import Dropout
from models.layers.ef_lstm import EFLSTM
from models.layers.encoders import EncoderConfig, MLPEncoder, make_encoder, segment_statistics
from models.layers.inlet import Inlet
from models.layers.lengths import sequence
from models.layers.lmf import LMF
from models.layers.mfn import MFN, MFNConfig
from models.layers.mult import MulT, MulTConfig
from models.layers.sequence import check_positive
from models.layers.transformer import check_rate
from models.model import Model, needs_several


@dataclass(frozen=True)
class EarlyFusion(SupervisedSettings):
    """One MLP on all modalities: vectors unchanged, sequences as means and deviations of ``segments`` equal parts.

    hidden: width of the hidden layers, of which there are ``layers`` + 2. dropout: of the inputs and before the output.
    """

    hidden: int = 256
    layers: int = 1
    segments: int = 4
    dropout: float = 0.2


@dataclass(frozen=True)
class LateFusion(SupervisedSettings):
    """An encoder and a linear head per modality; the heads' outputs are averaged over the modalities that a row has."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(hidden=128, out_dim=64, layers=1, dropout=0.2))


@dataclass(frozen=True)
class Aligned(SupervisedSettings):
    """Settings of models for aligned modalities.

    stride: averages this many neighbouring frames first. align: largest number of steps of a row. All its modalities
        get as many steps as the longest has: longer ones are averaged over equal parts, shorter ones repeat frames.
    """

    stride: int = 1
    align: int = 50


@dataclass(frozen=True)
class EFLSTMSettings(Aligned):
    """hidden, layers: states and layers of the LSTM. dropout: in the head."""

    hidden: int = 128
    layers: int = 1
    dropout: float = 0.5


@dataclass(frozen=True)
class MFNSettings(Aligned):
    """hidden: states of each modality's LSTM; one width for all of them, or one per modality.

    memory: width of the memory. networks, dropout: hidden width and dropout of the four networks of a step.
    out_hidden, out_dropout: those of the head.
    """

    hidden: tuple[int, ...] = (64,)
    memory: int = 64
    networks: int = 128
    dropout: float = 0.5
    out_hidden: int = 64
    out_dropout: float = 0.5


@dataclass(frozen=True)
class MulTSettings(SupervisedSettings):
    """stride: averages this many neighbouring frames first. sizes: sizes and dropout of MulT."""

    stride: int = 1
    sizes: MulTConfig = field(default_factory=MulTConfig)


@dataclass(frozen=True)
class LMFSettings(SupervisedSettings):
    """Encoders per modality, their low-rank fusion of width ``fused``, and a linear head."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(hidden=64, out_dim=32, layers=1, dropout=0.2))
    fused: int = 64
    rank: int = 4


class Everything(nn.Module):
    """All modalities as one vector [B, D]; a missing one is zero."""

    def __init__(self, inlet: Inlet, data: Dataset, segments: int):
        super().__init__()
        self.inlet, self.segments = inlet, segments
        self.sequences = tuple(modality.is_sequence for modality in data.modalities)
        self.dim = sum(
            dim * (2 * segments if is_sequence else 1)
            for dim, is_sequence in zip(inlet.dims, self.sequences, strict=True)
        )

    def forward(self, inputs: Mapping[str, Inputs]) -> list[Tensor]:
        parts = []
        for x, is_sequence in zip(self.inlet(inputs), self.sequences, strict=True):
            if not is_sequence:
                parts.append(x.values[:, 0])
                continue
            frames = sequence("x", x)
            parts.append(segment_statistics(frames.values, frames.steps(), self.segments))
        return [torch.cat(parts, 1)]


class _MLP(nn.Module):
    def __init__(self, dim: int, config: EarlyFusion, out: int):
        super().__init__()
        self.body = MLPEncoder(dim, config.hidden, config.hidden, config.layers, config.dropout)
        self.out = nn.Sequential(nn.ReLU(), Dropout(config.dropout), nn.Linear(config.hidden, out))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)


class _Encoders(nn.Module):
    """The raw inputs of each modality, in order."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names

    def forward(self, inputs: Mapping[str, Inputs]) -> list[Inputs]:
        return [inputs[name] for name in self.names]


class _Late(nn.Module):
    def __init__(self, data: Dataset, config: EncoderConfig, out: int):
        super().__init__()
        self.width = config.out_dim
        self.encoders = nn.ModuleList([make_encoder(modality, config) for modality in data.modalities])
        self.heads = nn.ModuleList([nn.Linear(self.width, out) for _ in self.encoders])

    def features(self, *inputs: Inputs) -> Tensor:
        """The concatenated encoder outputs and, in the last columns, indicators of the modalities that a row has."""
        encoded = [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]
        here = torch.stack([x.mask() for x in inputs], 1).to(encoded[0])
        masked = [e * here[:, m : m + 1] for m, e in enumerate(encoded)]
        return torch.cat([*masked, here], 1)

    def head(self, h: Tensor) -> Tensor:
        parts = h[:, : len(self.heads) * self.width].split(self.width, 1)
        here = h[:, len(self.heads) * self.width :]
        votes = torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)], 1)  # [B, M, K]
        return (votes * here[..., None]).sum(1) / here.sum(1, keepdim=True).clamp(min=1)

    def parts(self, *inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Features, and of them the encoders' outputs."""
        h = self.features(*inputs)
        return h, list(h[:, : len(self.heads) * self.width].split(self.width, 1))


class _LMF(nn.Module):
    def __init__(self, data: Dataset, config: LMFSettings, out: int):
        super().__init__()
        encoders = [make_encoder(modality, config.encoder) for modality in data.modalities]
        self.fusion = LMF(encoders, config.fused, config.rank)
        self.out = nn.Linear(config.fused, out)

    def features(self, *inputs: Inputs) -> Tensor:
        return self.fusion(*inputs)

    def parts(self, *inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Features, and the encoders' outputs that they are fused from."""
        encoded = self.fusion.encoded(*inputs)
        return self.fusion.fusion(*encoded), encoded

    def head(self, h: Tensor) -> Tensor:
        return self.out(h.relu())


def build_early(config: EarlyFusion, data: Dataset) -> Model:
    check_positive(hidden=config.hidden, segments=config.segments)
    check_rate("dropout", config.dropout)
    everything = Everything(Inlet(data.modalities, config.embedding), data, config.segments)
    return Supervised(everything, _MLP(everything.dim, config, outputs_of(data.target)), data, config.loss)


def build_late(config: LateFusion, data: Dataset) -> Model:
    net = _Late(data, config.encoder, outputs_of(data.target))
    return Supervised(_Encoders(data.names), net, data, config.loss)


def build_ef_lstm(config: EFLSTMSettings, data: Dataset) -> Model:
    inlet = _aligned(config, data)
    net = EFLSTM(inlet.dims, outputs_of(data.target), config.hidden, config.layers, config.dropout)
    return Supervised(inlet, net, data, config.loss)


def build_mfn(config: MFNSettings, data: Dataset) -> Model:
    inlet = _aligned(config, data)
    hidden = config.hidden * len(inlet.dims) if len(config.hidden) == 1 else config.hidden
    if len(hidden) != len(inlet.dims):
        raise ValueError(f"hidden must be one width or one per modality, {len(inlet.dims)}, got {config.hidden}")
    sizes = {name: config.networks for name in ("attention", "proposal", "retain", "update")}
    rates = {f"{name}_dropout": config.dropout for name in sizes}
    net = MFN(
        inlet.dims,
        outputs_of(data.target),
        MFNConfig(hidden, config.memory, **sizes, **rates),  # type: ignore[arg-type]
        config.out_hidden,
        config.out_dropout,
    )
    return Supervised(inlet, net, data, config.loss)


def build_mult(config: MulTSettings, data: Dataset) -> Model:
    needs_several("mult", data.names)
    inlet = Inlet(data.modalities, config.embedding, config.stride)
    return Supervised(inlet, MulT(inlet.dims, outputs_of(data.target), config.sizes), data, config.loss)


def build_lmf(config: LMFSettings, data: Dataset) -> Model:
    return Supervised(_Encoders(data.names), _LMF(data, config, outputs_of(data.target)), data, config.loss)


def _aligned(config: Aligned, data: Dataset) -> Inlet:
    check_positive(align=config.align)
    return Inlet(data.modalities, config.embedding, config.stride, config.align)
