"""Convolutions for pictures of one channel: [B, H W] to features, and codes back to pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.dropout import Dropout
from models.layers.sequence import check_positive

CHANNELS = (16, 32)


class PictureEncoder(nn.Module):
    """Two convolutions of stride 2 (3 x 3; 16 and 32 channels, ReLU), dropout and a linear layer.

    x: values [B, H W], or [B, 1, H W] as a sequence of one step, of pictures of ``shape`` (H, W); to [B, out_dim].
    FLOPs per picture, forward: 2.4 K H W for the convolutions and 2 out_dim 32 H W / 16 for the linear layer. The
    sizes are ours: the papers' image networks are not public. Raises ValueError for another number of pixels.
    """

    def __init__(self, shape: tuple[int, int], out_dim: int, dropout: float = 0.0):
        super().__init__()
        check_positive(height=shape[0], width=shape[1], out_dim=out_dim)
        self.shape, self.out_dim = shape, out_dim
        first, second = CHANNELS
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, first, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, stride=2, padding=1)
        )
        height, width = reduced(shape)
        self.out = nn.Sequential(Dropout(dropout), nn.Linear(second * height * width, out_dim))

    def forward(self, x: Inputs | Tensor) -> Tensor:
        values = (x.values if isinstance(x, Inputs) else x).flatten(1)
        if values.shape[1] != self.shape[0] * self.shape[1]:
            raise ValueError(f"x must hold pictures of {self.shape[0]} x {self.shape[1]}, got {values.shape[1]} pixels")
        return self.out(self.convolutions(values.unflatten(1, (1, *self.shape))).relu().flatten(1))


class PictureDecoder(nn.Module):
    """A code [B, code] to pictures [B, 1, H W] in (0, 1): a linear layer, two transposed convolutions of stride 2."""

    def __init__(self, code: int, shape: tuple[int, int]):
        super().__init__()
        self.shape, self.hidden = shape, code
        first, second = CHANNELS
        self.small = reduced(shape)
        self.into = nn.Linear(code, second * self.small[0] * self.small[1])
        self.convolutions = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(second, first, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(first, 1, 4, stride=2, padding=1),
        )

    def forward(self, code: Tensor) -> Tensor:
        small = self.into(code).unflatten(1, (CHANNELS[1], *self.small))
        found = self.convolutions(small)[:, 0, : self.shape[0], : self.shape[1]]
        return torch.sigmoid(found).flatten(1)[:, None]


def reduced(shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width after two strides of 2, rounded up."""
    return -(-shape[0] // 4), -(-shape[1] // 4)
