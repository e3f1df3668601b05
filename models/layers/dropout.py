"""Dropout whose masks cost a quarter of torch's on a CPU.

torch draws one random double per value there. Sixteen random bits per value are enough: the rate is rounded to a
multiple of 2^-16, which changes the mean of a mask by less than 1e-5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 4096  # values below which torch's single call is faster
_LEVELS = 1 << 16


def mask(x: Tensor, rate: float) -> Tensor:
    """Factors of the shape and type of ``x``: 0 with probability ``rate``, else 1 / (1 - rate)."""
    number = x.numel()
    if x.device.type != "cpu" or number < SMALL:
        return F.dropout(torch.ones_like(x), rate)
    words = torch.empty((number + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = words.view(torch.int16)[:number].view(x.shape)
    return (draws >= round(rate * _LEVELS) - _LEVELS // 2).to(x.dtype).mul_(1.0 / (1.0 - rate))


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """``torch.nn.functional.dropout`` with other random numbers."""
    return x * mask(x, rate) if training and rate > 0 else x


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` with other random numbers."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
