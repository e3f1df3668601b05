"""MFM's encoders: of all modalities together with memory fusion, by one LSTM, or each by its own; and the map G."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.dropout import Dropout
from models.layers.mfn import MemoryFusion, MFNConfig
from models.layers.pictures import PictureEncoder
from models.layers.sequence import LSTMEncoder
from models.mfm.config import Settings

Shape = tuple[int, int] | None


def side_by_side(inputs: Sequence[Inputs]) -> Inputs:
    return Inputs(torch.cat([x.values for x in inputs], 2), inputs[0].lengths)


class JointEncoder(nn.Module):
    """MFN's features and a linear layer: aligned sequences to Z_y [B, code]."""

    def __init__(self, dims: Sequence[int], settings: Settings):
        super().__init__()
        sizes = {name: settings.networks for name in ("attention", "proposal", "retain", "update")}
        rates = {f"{name}_dropout": settings.network_dropout for name in sizes}
        config = MFNConfig(settings.widths("hidden", len(dims)), settings.memory, **sizes, **rates)  # type: ignore[arg-type]
        self.fusion = MemoryFusion(dims, config)
        self.out = nn.Linear(self.fusion.out_dim, settings.joint_code)

    def forward(self, inputs: Sequence[Inputs]) -> Tensor:
        return self.out(self.fusion(*inputs))


class TogetherEncoder(nn.Module):
    """An LSTM on sequences side by side: to a code [B, code]."""

    def __init__(self, dims: Sequence[int], code: int):
        super().__init__()
        self.encoder = LSTMEncoder(sum(dims), code, code)

    def forward(self, inputs: Sequence[Inputs]) -> Tensor:
        return self.encoder(side_by_side(inputs))


class SeparateEncoder(nn.Module):
    """An encoder for each modality, an LSTM or convolutions, and a linear layer on all of them: to a code [B, code]."""

    def __init__(self, dims: Sequence[int], shapes: Sequence[Shape], hidden: Sequence[int], code: int):
        super().__init__()
        self.encoders = nn.ModuleList(
            [
                LSTMEncoder(dim, width, None) if shape is None else PictureEncoder(shape, width)
                for dim, shape, width in zip(dims, shapes, hidden, strict=True)
            ]
        )
        self.out = nn.Linear(sum(hidden), code)

    def forward(self, inputs: Sequence[Inputs]) -> Tensor:
        features = [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]
        return self.out(torch.cat(features, 1).relu())


def factor_map(code: int, factor: int, dropout: float) -> nn.Sequential:
    """G: ReLU(W_2 Drop(ReLU(W_1 z + b_1)) + b_2)."""
    layers = (nn.Linear(code, factor), nn.ReLU(), Dropout(dropout), nn.Linear(factor, factor), nn.ReLU())
    return nn.Sequential(*layers)
