"""Low-rank multimodal fusion (Liu et al., ACL 2018, arXiv 1806.00064).

The tensor product of [1; z_m] over modalities, read out by a weight tensor of rank r, without forming either:

    out = sum_k w_k prod_m ([1; z_m] W_m^k) + b,   W_m [r, d_m + 1, o], w [1, r], b [1, o]                (eq. 6-8)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.dropout import Dropout
from models.layers.lengths import mean_over_steps, sequence
from models.layers.sequence import check_positive
from models.layers.transformer import check_rate


class LowRankFusion(nn.Module):
    """Vectors [B, d_m] of M modalities to [B, out_dim]: sum (d_m + 1) r o + r + o parameters.

    FLOP per item, forward: 2 r o sum (d_m + 1). Xavier-normal factors and w, b zero, as in the public code. The public
    training gives ``factors()`` an optimiser group of their own.
    """

    def __init__(self, dims: Sequence[int], out_dim: int, rank: int = 4):
        super().__init__()
        check_positive(dims=min(dims, default=0), out_dim=out_dim, rank=rank)
        self.dims, self.out_dim, self.rank = tuple(dims), out_dim, rank
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(rank, dim + 1, out_dim)) for dim in dims])
        self.fusion_weight = nn.Parameter(torch.empty(1, rank))
        self.fusion_bias = nn.Parameter(torch.zeros(1, out_dim))
        for weight in (*self.weights, self.fusion_weight):
            nn.init.xavier_normal_(weight)

    def factors(self) -> list[nn.Parameter]:
        """The W_m."""
        return list(self.weights)

    def forward(self, *vectors: Tensor) -> Tensor:
        if len(vectors) != len(self.dims):
            raise ValueError(f"vectors must be one per modality, {len(self.dims)}, got {len(vectors)}")
        product = None
        for m, (z, dim, weight) in enumerate(zip(vectors, self.dims, self.weights, strict=True)):
            if z.dim() != 2 or z.shape[1] != dim:
                raise ValueError(f"vectors[{m}] must have shape [batch, {dim}], got {tuple(z.shape)}")
            # The row of W_m that the leading 1 selects is a bias: one matrix product for all ranks.
            part = torch.addmm(weight[:, 0].flatten(), z, weight[:, 1:].transpose(0, 1).flatten(1))
            product = part if product is None else product * part
        assert product is not None
        ranks = product.unflatten(1, (self.rank, self.out_dim))
        return torch.einsum("k,bko->bo", self.fusion_weight[0], ranks) + self.fusion_bias


class PooledEncoder(nn.Module):
    """LMF's network of a non-verbal modality: mean over the steps, BatchNorm, dropout, three layers of ReLU.

    Vectors [B, D], or sequences [B, T, D] of which the steps within each length count, to [B, hidden].
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        check_positive(dim=dim, hidden=hidden)
        check_rate("dropout", dropout)
        self.dim, self.out_dim = dim, hidden
        layers = [part for k in range(3) for part in (nn.Linear(hidden if k else dim, hidden), nn.ReLU())]
        self.net = nn.Sequential(nn.BatchNorm1d(dim), Dropout(dropout), *layers)

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values = x.values if isinstance(x, Inputs) else x
        if values.dim() == 2:
            if values.shape[1] != self.dim:
                raise ValueError(f"x must have {self.dim} features, got {values.shape[1]}")
            return self.net(values)
        values, lengths, _ = sequence("x", x, self.dim)
        return self.net(mean_over_steps(values, lengths))


class LMF(nn.Module):
    """One encoder per modality (PooledEncoder, LSTMEncoder in the public code) and their LowRankFusion, [B, out_dim].

    The encoders have an ``out_dim``. The public code fuses straight into the prediction; for a fused representation
    choose a wider ``out_dim`` and put a linear layer behind it.
    """

    def __init__(self, encoders: Sequence[nn.Module], out_dim: int = 1, rank: int = 4):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.fusion = LowRankFusion([int(encoder.out_dim) for encoder in encoders], out_dim, rank)  # type: ignore[arg-type]

    def encoded(self, *inputs: Inputs | Tensor) -> list[Tensor]:
        """What the encoders make of each modality, before the fusion."""
        if len(inputs) != len(self.encoders):
            raise ValueError(f"inputs must be one per modality, {len(self.encoders)}, got {len(inputs)}")
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]

    def forward(self, *inputs: Inputs | Tensor) -> Tensor:
        return self.fusion(*self.encoded(*inputs))
