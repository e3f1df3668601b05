"""Between the shapes of callers, [*, batch, features], and those of operators, [G, batch, features].

Both ways are taken inside autograd's functions, where nothing is recorded: every view outside would be one more node to
run in backward, and at small batches a loss is little else.
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
    """An operator's output in another shape, and no view: some of those cannot be changed in place by callers."""
    if torch.compiler.is_compiling():
        return t.reshape(shape)
    return t if t.dim() == len(shape) else t.contiguous().resize_(shape)
