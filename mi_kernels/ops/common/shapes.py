"""Converts between the shapes of callers, [*, batch, features], and those of operators, [G, batch, features].

Both conversions run inside autograd functions, where nothing is recorded. Outside, every view would add a node to the
backward pass, and such nodes dominate the time of a loss at small batches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped(t: Tensor) -> Tensor:
    """[*, B, D] -> [G, B, D], contiguous."""
    dims = t.dim()
    if dims != 3:
        t = t.unsqueeze(0) if dims == 2 else t.flatten(0, -3)
    return t.contiguous()


def reshaped(t: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Reshapes an operator's output without returning a view, because some views cannot be changed in place by
    callers."""
    if torch.compiler.is_compiling():
        return t.reshape(shape)
    return t if t.dim() == len(shape) else t.contiguous().resize_(shape)
