"""Encoders of one modality: Inputs (or a plain tensor) to features [B, out_dim]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.data.base import Inputs, Modality

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

    def __init__(self, dim: int, hidden: int = 512, out_dim: int = 128, layers: int = 2):
        super().__init__()
        self.out_dim = out_dim
        self.net = mlp(dim, hidden, out_dim, layers)

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values = x.values if isinstance(x, Inputs) else x
        return self.net(values.flatten(1))


class GRUEncoder(nn.Module):
    """Sequences [B, T, D] with lengths: bidirectional GRU, mean of the states within each length, linear.

    ``stride`` averages neighbouring frames first, which divides the number of sequential steps. The padding
    of a batch never reaches the output.
    """

    def __init__(self, dim: int, hidden: int = 64, out_dim: int = 128, stride: int = 1):
        super().__init__()
        self.out_dim, self.stride = out_dim, stride
        self.gru = nn.GRU(dim, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, out_dim)

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values, lengths = x if isinstance(x, Inputs) else (x, None)
        if lengths is None:
            lengths = torch.full((len(values),), values.shape[1])
        if self.stride > 1:
            values, lengths = _average_frames(values, lengths, self.stride)
        packed = nn.utils.rnn.pack_padded_sequence(values, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)  # zero beyond lengths
        return self.out(states.sum(1) / lengths.to(states)[:, None])


def _average_frames(values: Tensor, lengths: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Means of ``stride`` neighbouring frames; a last, incomplete window averages the frames that it has."""
    values = nn.functional.pad(values, (0, 0, 0, -values.shape[1] % stride))
    windows = values.unflatten(1, (-1, stride)).sum(2)
    starts = torch.arange(windows.shape[1], device=values.device) * stride
    counts = (lengths.to(values.device)[:, None] - starts).clamp(1, stride)
    return windows / counts[..., None], (lengths + stride - 1) // stride


def make_encoder(modality: Modality, hidden: int, out_dim: int, layers: int, stride: int = 1) -> nn.Module:
    """A GRU for sequences, an MLP for vectors."""
    if modality.is_sequence:
        return GRUEncoder(modality.dim, hidden, out_dim, stride)
    return MLPEncoder(modality.dim, hidden, out_dim, layers)
