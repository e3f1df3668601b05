"""Shuffled rows: every modality of a row comes from another row, with or without that row's length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.batch import Batch, Inputs


def with_shuffled(batch: Batch, indices: Sequence[Tensor], lengths: str = "kept") -> Batch:
    """The rows of ``batch`` followed by m rows whose modality k is that of row indices[k][i].

    lengths: "kept" gives shuffled row i the lengths of row i of the batch; "moved" those of the rows that the contents
    come from. The labels of the shuffled rows are those of the first m rows; losses must not use them.
    """
    number = len(indices[0])
    rows = torch.arange(batch.size, device=batch.rows.device)
    inputs = {}
    for (name, x), index in zip(batch.inputs.items(), indices, strict=True):
        index = index.to(x.values.device)
        if lengths == "kept" and x.lengths is not None:
            other = fitted(x, index)
            inputs[name] = Inputs(
                torch.cat([x.values, other.values]),
                torch.cat([x.lengths, x.lengths[:number]]),
                None if x.present is None else torch.cat([x.present, x.present[:number]]),
            )
        else:
            inputs[name] = x.take(torch.cat([rows, index]))
    return batch.take(torch.cat([rows, rows[:number]]))._replace(inputs=inputs, views=())


def fitted(x: Inputs, index: Tensor) -> Inputs:
    """Row i gets the contents of row index[i] in the length of row i: cut if too long, repeated from the start if too
    short."""
    assert x.lengths is not None
    number, steps = len(index), x.values.shape[1]
    own, length = x.lengths[:number].to(index.device), x.lengths.to(index.device)[index]
    t = torch.arange(steps, device=index.device)
    values = x.values[index[:, None], t % length.clamp(min=1)[:, None]]  # [m, T, ...]
    inside = (t < own[:, None]).reshape(number, steps, *[1] * (values.dim() - 2))
    return Inputs(values.masked_fill(~inside, 0), x.lengths[:number], None)
