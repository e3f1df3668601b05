"""Encoders of one modality: Inputs (or a plain tensor) to features [B, out_dim]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.data.base import Inputs, Modality
from models.layers import sequence

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
        self.dropout = nn.Dropout(dropout)
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
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, out_dim))

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
    values, lengths = x if isinstance(x, Inputs) else (x, None)
    if lengths is None:
        lengths = torch.full((len(values),), values.shape[1])
    return _average_frames(values, lengths, stride) if stride > 1 else (values, lengths)


def _average_frames(values: Tensor, lengths: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Means of ``stride`` neighbouring frames; a last, incomplete window averages the frames that it has."""
    values = nn.functional.pad(values, (0, 0, 0, -values.shape[1] % stride))
    windows = values.unflatten(1, (-1, stride)).sum(2)
    starts = torch.arange(windows.shape[1], device=values.device) * stride
    counts = (lengths.to(values.device)[:, None] - starts).clamp(1, stride)
    return windows / counts[..., None], (lengths + stride - 1) // stride


def make_encoder(
    modality: Modality,
    hidden: int,
    out_dim: int,
    layers: int,
    stride: int = 1,
    sequences: str = "segments",
    segments: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """An MLP for vectors; for sequences statistics of segments ("segments") or a GRU ("gru")."""
    if not modality.is_sequence:
        return MLPEncoder(modality.dim, hidden, out_dim, layers, dropout)
    if sequences == "segments":
        return SegmentEncoder(modality.dim, hidden, out_dim, stride, segments, dropout)
    return GRUEncoder(modality.dim, hidden, out_dim, stride, dropout)
