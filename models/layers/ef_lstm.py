"""Early-fusion LSTM: aligned modalities concatenated step by step, one LSTM, a small head.

    h_T = LSTM([x_1; .. x_M])[last],   y = W_2 Drop(ReLU(W_1 h_T + b_1)) + b_2

As in the public code of MFN (one layer of 128); MMSA's has more layers and a BatchNorm over the time axis, which ties
the model to one length and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.dropout import Dropout
from models.layers.lengths import same_steps, sequence
from models.layers.sequence import LSTMEncoder, check_positive
from models.layers.transformer import check_rate


class EFLSTM(nn.Module):
    """Aligned sequences [B, T, d_m] that share their lengths to predictions [B, out_dim].

    ``features`` gives h_T [B, hidden]. The public code reads the state after the padding: pass plain tensors.
    FLOP per item, forward: 8 T H (D + H) for the first layer, D the sum of the d_m, and 16 T H^2 for any other.
    """

    def __init__(self, dims: Sequence[int], out_dim: int = 1, hidden: int = 128, layers: int = 1, dropout: float = 0.5):
        super().__init__()
        check_positive(dims=min(dims, default=0), out_dim=out_dim)
        check_rate("dropout", dropout)
        self.dims, self.out_dim = tuple(dims), out_dim
        self.encoder = LSTMEncoder(sum(dims), hidden, layers=layers)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, out_dim))

    def features(self, *inputs: Inputs | Tensor) -> Tensor:
        if len(inputs) != len(self.dims):
            raise ValueError(f"inputs must be one per modality, {len(self.dims)}, got {len(inputs)}")
        names = tuple(f"inputs[{m}]" for m in range(len(inputs)))
        sequences = [sequence(name, x, dim) for name, x, dim in zip(names, inputs, self.dims, strict=True)]
        lengths = same_steps(names, sequences)
        return self.encoder(Inputs(torch.cat([x.values for x in sequences], 2), lengths))

    def forward(self, *inputs: Inputs | Tensor) -> Tensor:
        return self.head(self.features(*inputs))

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)
