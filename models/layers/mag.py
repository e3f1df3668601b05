"""Multimodal adaptation gate (Rahman et al., ACL 2020, arXiv 1908.05787): words shifted by what accompanies them.

Per word, with e its embedding [E] and x_m the aligned features of every other modality [d_m],

    g_m = ReLU(W_gm [x_m; e] + b_gm),   h = sum_m g_m * (W_m x_m + b_m)
    alpha = min(beta |e| / (|h| + 1e-6), 1),   e' = Drop(LayerNorm(e + alpha h))                        (eq. 3-6)

|h| counts as 1 where it is 0. The public code has the biases inside the linear layers, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.dropout import Dropout
from models.layers.inlet import resampled
from models.layers.lengths import same_steps, sequence, steps_within
from models.layers.sequence import check_positive
from models.layers.transformer import check_rate


class AdaptationGate(nn.Module):
    """Words [B, T, E] and aligned modalities [B, T, d_m] to shifted words [B, T, E], zero beyond the lengths.

    All inputs share their lengths. The public gate has none and shifts padding too (|h| > 0 there, by the biases);
    plain tensors do that. FLOP per item, forward: 2 T E (E + 2 d_m) for every modality.
    """

    def __init__(self, text_dim: int, dims: Sequence[int], beta: float = 1.0, dropout: float = 0.5):
        super().__init__()
        check_positive(text_dim=text_dim, dims=min(dims, default=0))
        check_rate("dropout", dropout)
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.text_dim, self.dims, self.beta = text_dim, tuple(dims), beta
        self.gates = nn.ModuleList([nn.Linear(dim + text_dim, text_dim) for dim in dims])
        self.shifts = nn.ModuleList([nn.Linear(dim, text_dim) for dim in dims])
        self.norm, self.dropout = nn.LayerNorm(text_dim), Dropout(dropout)

    def forward(self, text: Inputs | Tensor, *others: Inputs | Tensor) -> Tensor:
        if len(others) != len(self.dims):
            raise ValueError(f"others must be one per modality, {len(self.dims)}, got {len(others)}")
        names = ("text", *(f"others[{m}]" for m in range(len(others))))
        inputs = [
            sequence(name, x, dim)
            for name, x, dim in zip(names, (text, *others), (self.text_dim, *self.dims), strict=True)
        ]
        lengths = same_steps(names, inputs)
        return self.shifted(inputs[0].values, [x.values for x in inputs[1:]], lengths)

    def shifted(self, words: Tensor, others: Sequence[Tensor], lengths: Tensor | None) -> Tensor:
        """The gate on checked inputs without padding contents."""
        shift = torch.zeros_like(words)
        for gate, linear, x in zip(cast(list[nn.Linear], self.gates), self.shifts, others, strict=True):
            of_other, of_word = gate.weight.split((x.shape[2], words.shape[2]), 1)
            opened = F.linear(x, of_other, gate.bias) + F.linear(words, of_word)
            shift = shift + opened.relu() * linear(x)
        size = torch.linalg.vector_norm(shift, dim=2, keepdim=True)
        size = torch.where(size == 0, 1.0, size)
        alpha = (self.beta * torch.linalg.vector_norm(words, dim=2, keepdim=True) / (size + 1e-6)).clamp(max=1)
        found = self.dropout(self.norm(words + alpha * shift))
        return found if lengths is None else found * steps_within(lengths, found.shape[1])[..., None]


def beside(words: Inputs, x: Inputs) -> Inputs:
    """A sequence resampled to the steps of the words."""
    to, frames = words.steps(), sequence("others", x)
    found = resampled(frames.values, frames.steps(), to)
    return Inputs(F.pad(found, (0, 0, 0, words.values.shape[1] - int(to.max()))), words.lengths)
