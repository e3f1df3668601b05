"""Encoders of one modality: Inputs (or a plain tensor) to features [B, out_dim]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.data.dataset import Modality
from models.layers import sequence
from models.layers.dropout import Dropout
from models.layers.lengths import sequence as checked
from models.layers.pictures import PictureEncoder
from models.layers.sequence import check_choice
from models.layers.transformer import check_rate

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(dim: int, hidden: int, out: int, layers: int, activation: str = "relu") -> nn.Sequential:
    """FactorCL's mlp: ``layers`` counts the hidden-to-hidden layers, so that 1 means two hidden layers."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    act = ACTIVATIONS[activation]
    parts: list[nn.Module] = [nn.Linear(dim, hidden), act()]
    for _ in range(layers):
        parts += [nn.Linear(hidden, hidden), act()]
    return nn.Sequential(*parts, nn.Linear(hidden, out))


class MLPEncoder(nn.Module):
    """Vectors [B, D] through FactorCL's mlp; its synthetic experiment uses hidden 512, layers 2, out 128."""

    def __init__(self, dim: int, hidden: int = 512, out_dim: int = 128, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.out_dim = out_dim
        self.dropout = Dropout(dropout)
        self.net = mlp(dim, hidden, out_dim, layers)

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values = x.values if isinstance(x, Inputs) else x
        return self.net(self.dropout(values.flatten(1)))


class GRUEncoder(sequence.GRUEncoder):
    """Sequences [B, T, D] with lengths: bidirectional GRU, mean of the states within each length, linear.

    ``stride`` averages neighbouring frames first, which divides the number of sequential steps. The padding
    of a batch never reaches the output.
    """

    def __init__(self, dim: int, hidden: int = 64, out_dim: int = 128, stride: int = 1, dropout: float = 0.0):
        super().__init__(dim, hidden, out_dim, bidirectional=True, readout="mean", dropout=dropout)
        self.stride = stride

    def forward(self, x: Inputs | Tensor) -> Tensor:
        return super().forward(Inputs(*_frames(x, self.stride)))


class SegmentEncoder(nn.Module):
    """Sequences [B, T, D] with lengths: convolutions over time, then statistics of ``segments`` equal parts.

    A mean over all frames forgets the order of a movement, and with it which of two mirrored actions it was.
    Here each part of a sequence keeps its own mean and standard deviation, of the frames and of two layers of
    convolutions (width 5) of them; dropout and a linear layer follow. The padding of a batch never reaches the
    output. ``stride`` averages neighbouring frames first.
    """

    def __init__(
        self, dim: int, hidden: int = 64, out_dim: int = 128, stride: int = 1, segments: int = 4, dropout: float = 0.0
    ):
        super().__init__()
        self.out_dim, self.stride, self.segments = out_dim, stride, segments
        self.convolutions = nn.ModuleList([nn.Conv1d(width, hidden, 5, padding=2) for width in (dim, hidden)])
        width = 2 * segments * (dim + hidden)
        self.out = nn.Sequential(nn.LayerNorm(width), Dropout(dropout), nn.Linear(width, out_dim))

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values, lengths = _frames(x, self.stride)
        lengths = lengths.to(values.device)
        steps = torch.arange(values.shape[1], device=values.device)
        valid = (steps < lengths[:, None])[..., None].to(values)  # [B, T, 1]
        hidden = values
        for layer in self.convolutions:
            hidden = layer(hidden.transpose(1, 2)).transpose(1, 2).relu() * valid
        states = torch.cat([values, hidden], 2)
        return self.out(segment_statistics(states, lengths, self.segments))


def segment_statistics(values: Tensor, lengths: Tensor, segments: int) -> Tensor:
    """Mean and deviation of ``segments`` equal parts of each sequence: [B, T, D], lengths [B] -> [B, 2 * segments * D].

    Frames at or beyond a sequence's length do not count. A part without a frame gives zeros.
    """
    steps = torch.arange(values.shape[1], device=values.device)
    part = (steps * segments // lengths[:, None])[:, None]  # [B, 1, T]
    member = (part == torch.arange(segments, device=values.device)[:, None]).to(values)
    weight = member / member.sum(2, keepdim=True).clamp(min=1)  # [B, segments, T]
    mean = weight @ values
    variance = (weight @ values.square() - mean.square()).clamp(min=0)
    return torch.cat([mean, (variance + 1e-5).sqrt()], 2).flatten(1)


def _frames(x: Inputs | Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Values [B, T, D] and lengths [B] of a batch, means of ``stride`` neighbouring frames."""
    found = checked("x", x)
    values, lengths = found.values, found.steps()
    return average_frames(values, lengths, stride) if stride > 1 else (values, lengths)


def average_frames(values: Tensor, lengths: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Means of ``stride`` neighbouring frames; a last, incomplete window averages the frames that it has."""
    values = nn.functional.pad(values, (0, 0, 0, -values.shape[1] % stride))
    windows = values.unflatten(1, (-1, stride)).sum(2)
    starts = torch.arange(windows.shape[1], device=values.device) * stride
    counts = (lengths.to(values.device)[:, None] - starts).clamp(1, stride)
    return windows / counts[..., None], (lengths + stride - 1) // stride


@dataclass(frozen=True)
class EncoderConfig:
    """The encoders of a model, one of a kind for every modality.

    hidden, out_dim: their widths. layers: of vectors' MLPs, hidden layers - 1.
    pictures: a modality of pictures goes through an MLP on its pixels ("mlp"), or convolutions ("convolution").
    kind: of sequences, statistics of ``segments`` equal parts ("segments") or a recurrent net ("gru").
    stride: of sequences, averages this many neighbouring frames first.
    embedding: of tokens without a table, the width of the trained embedding.
    """

    hidden: int = 512
    out_dim: int = 128
    layers: int = 2
    stride: int = 1
    kind: str = "segments"
    segments: int = 4
    dropout: float = 0.0
    embedding: int = 64
    pictures: str = "mlp"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("segments", "gru"))
        check_choice("pictures", self.pictures, ("mlp", "convolution"))
        sequence.check_positive(
            hidden=self.hidden,
            out_dim=self.out_dim,
            stride=self.stride,
            segments=self.segments,
            embedding=self.embedding,
        )
        if self.layers < 0:
            raise ValueError(f"layers must not be negative, got {self.layers}")
        check_rate("dropout", self.dropout)


def make_encoder(modality: Modality, config: EncoderConfig) -> nn.Module:
    """An MLP for vectors, which convolutions replace for pictures; of sequences segments or a GRU; tokens are embedded
    first."""
    width = modality.dim or config.embedding
    if modality.shape is not None and config.pictures == "convolution":
        return PictureEncoder(modality.shape, config.out_dim, config.dropout)
    if not modality.is_sequence:
        return MLPEncoder(width, config.hidden, config.out_dim, config.layers, config.dropout)
    encoder: nn.Module
    if config.kind == "segments":
        encoder = SegmentEncoder(width, config.hidden, config.out_dim, config.stride, config.segments, config.dropout)
    else:
        encoder = GRUEncoder(width, config.hidden, config.out_dim, config.stride, config.dropout)
    return TokenEncoder(Embedding(modality, config.embedding), encoder) if modality.is_tokens else encoder


class Embedding(nn.Module):
    """Tokens [B, T] to [B, T, E]: the data's own table, held fixed, or a trained one of width ``dim``."""

    def __init__(self, modality: Modality, dim: int):
        super().__init__()
        fixed = modality.table is not None
        self.dim = modality.dim if fixed else dim
        # A table that comes with the data is data: it is not stored with the weights.
        self.register_buffer("table", modality.table if fixed else None, persistent=False)
        self.weights = None if fixed else nn.Embedding(modality.vocabulary, dim, padding_idx=0)

    def forward(self, x: Inputs) -> Inputs:
        values = self.table[x.values] if self.weights is None else self.weights(x.values)  # type: ignore[index]
        return Inputs(values, x.lengths, x.present)


class TokenEncoder(nn.Module):
    """An encoder behind an Embedding."""

    def __init__(self, embedding: Embedding, encoder: nn.Module):
        super().__init__()
        self.out_dim = encoder.out_dim
        self.embedding, self.encoder = embedding, encoder

    def forward(self, x: Inputs) -> Tensor:
        return self.encoder(self.embedding(x))
