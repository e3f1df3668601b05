"""From the modalities of a batch to what sequence models take: float sequences, aligned step by step where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.data.dataset import Modality
from models.layers.encoders import Embedding, average_frames
from models.layers.lengths import steps_within


class Inlet(nn.Module):
    """Every modality as sequences [B, T, D]: vectors become one step, tokens are embedded.

    A missing modality has length 0. stride: averages this many neighbouring frames of every sequence.
    align: 0 leaves each modality its own steps. Otherwise a row has the same steps in all of them, as many as its
        longest modality but at most ``align``: a longer one is averaged over equal parts, a shorter one repeats frames,
        a missing one is zero. Rows that are aligned already and short enough stay as they are.
    ``dims`` are the features per step.
    """

    def __init__(self, modalities: Sequence[Modality], embedding: int = 64, stride: int = 1, align: int = 0):
        super().__init__()
        if embedding < 1 or stride < 1 or align < 0:
            raise ValueError(
                f"embedding and stride must be at least 1 and align at least 0, got {embedding}, {stride} and {align}"
            )
        self.names = tuple(modality.name for modality in modalities)
        self.stride, self.align = stride, align
        self.embeddings = nn.ModuleList([Embedding(m, embedding) if m.is_tokens else nn.Identity() for m in modalities])
        self.dims = tuple(m.dim or embedding for m in modalities)

    def forward(self, inputs: Mapping[str, Inputs]) -> list[Inputs]:
        found = []
        for name, embed in zip(self.names, self.embeddings, strict=True):
            x = cast(Inputs, embed(inputs[name]))
            found.append(self._sequence(x))
        return aligned(found, self.align) if self.align else found

    def _sequence(self, x: Inputs) -> Inputs:
        if x.values.dim() == 2:
            return Inputs(x.values[:, None], None if x.present is None else x.present.long(), x.present)
        if self.stride == 1:
            return x
        values, lengths = average_frames(x.values, x.steps(), self.stride)
        return Inputs(values, lengths, x.present)


def aligned(inputs: Sequence[Inputs], limit: int) -> list[Inputs]:
    """Sequences resampled, row by row, to the steps of the row's longest modality, at most ``limit``."""
    lengths = [x.steps() for x in inputs]
    steps = torch.stack(lengths).amax(0).clamp(1, limit)
    return [Inputs(resampled(x.values, n, steps), steps) for x, n in zip(inputs, lengths, strict=True)]


def resampled(values: Tensor, lengths: Tensor, steps: Tensor) -> Tensor:
    """[B, T, D] with lengths [B] to ``steps`` [B] means of equal parts each, [B, max steps, D], zero beyond them.

    Part j of a row has the frames from floor(j L / S) up to floor((j + 1) L / S), at least one. A row of length 0 gives
    zeros. FLOP: 2 B T S D.
    """
    j = torch.arange(int(steps.max()), device=values.device)
    start = (j * lengths[:, None]).div(steps[:, None], rounding_mode="floor")
    stop = ((j + 1) * lengths[:, None]).div(steps[:, None], rounding_mode="floor")
    stop = torch.maximum(stop, start + 1)
    t = torch.arange(values.shape[1], device=values.device)
    inside = (t >= start[..., None]) & (t < stop[..., None]) & (t < lengths[:, None, None])  # [B, S, T]
    inside &= steps_within(steps, len(j))[..., None]
    weights = inside.to(values.dtype)
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1)
    return weights @ values
