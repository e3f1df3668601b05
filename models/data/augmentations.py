"""Augmented views, vectorised over the batch (FactorCL, Definitions 3 and 4 and Table 5).

An *independent* augmentation may change everything that the label does not depend on. A *unique* augmentation of the
second modality preserves what the first modality refers to. The public code has both for one data set only; we follow
its transforms where they exist and Table 5 otherwise.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from models.batch import Inputs
from models.data.dataset import Modality


class Augmentation:
    """Draws a view of one modality: ``augment(inputs, generator)`` returns Inputs of the same shape.

    independent: vectors: one of {swap halves, noise 0.01, zero 10 % of the features, identity} per row;
    sequences: one of {permute the frames, noise 0.1, zero a fifth of the frames, identity};
    images: shift by up to one pixel (the crop), brightness and pixel noise; tokens: a tenth of them becomes 0.
    unique: vectors: noise or identity; sequences: noise on still frames only; images: the same without the
        shift; tokens: identity.
    mixing: independent views that Table 5 names for MIMIC and the public code lacks: sequences are also warped in time
    (`time_warp`), vectors also mixed with another row of the batch (`cutmix`); the rest as independent.
    """

    def __init__(self, modality: Modality, unique: bool = False, mixing: bool = False):
        self.unique, self.mixing = unique, mixing
        self.shape, self.is_tokens = modality.shape, modality.is_tokens

    def __call__(self, inputs: Inputs, generator: Generator) -> Inputs:
        return Inputs(self._view(inputs, generator), inputs.lengths, inputs.present)

    def _view(self, inputs: Inputs, generator: Generator) -> Tensor:
        values, lengths, _ = inputs
        if self.is_tokens:
            kept = torch.rand(values.shape, generator=generator) >= 0.1
            return values if self.unique else values * kept
        if lengths is not None:
            if self.unique:
                return _still_noise(values, lengths, generator)
            return _sequence_view(values, lengths, generator, self.mixing)
        if self.shape is not None:
            return _image_view(values, self.shape, not self.unique, generator)
        return _vector_view(values, self.unique, generator, self.mixing)


def noisy(inputs: Inputs, scale: float, generator: Generator) -> Inputs:
    """Adds normal noise with deviation ``scale`` to every value except padding; tokens are unchanged."""
    values, lengths, present = inputs
    if not values.is_floating_point():
        return inputs
    noise = scale * _randn(values, generator)
    if lengths is not None:
        noise *= (torch.arange(values.shape[1]) < lengths[:, None])[..., None]
    elif present is not None:
        noise *= present[:, None]
    return Inputs(values + noise, lengths, present)


def _randn(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def _choose(options: list[Tensor], generator: Generator) -> Tensor:
    """One option per row, uniformly."""
    rows = len(options[0])
    pick = torch.randint(len(options), (rows,), generator=generator)
    return torch.stack(options)[pick, torch.arange(rows)]


def cutmix(x: Tensor, generator: Generator) -> Tensor:
    """Vectors [B, D] with a run of their features from another row of the batch; the run's share is uniform on [0, 1].

    CutMix (Yun et al. 2019) on features, with lambda ~ Beta(1, 1) per row.
    """
    rows, dim = x.shape
    other = (torch.arange(rows) + torch.randint(1, max(rows, 2), (rows,), generator=generator)) % rows
    size = (torch.rand(rows, generator=generator) * (dim + 1)).long()
    start = (torch.rand(rows, generator=generator) * (dim - size + 1)).long()
    place = torch.arange(dim)
    inside = (place >= start[:, None]) & (place < (start + size)[:, None])
    return torch.where(inside, x[other], x)


def time_warp(x: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
    """Sequences [B, T, D] with a random step moved by up to 0.3 of their length and the rest stretched linearly.

    Frames between two steps are interpolated. Ends, order and lengths stay; padding stays zero.
    """
    steps, last = torch.arange(x.shape[1], dtype=x.dtype), (lengths - 1).clamp(min=0)[:, None].to(x.dtype)
    draw = torch.rand(2, len(x), 1, generator=generator, dtype=x.dtype)
    to = (0.35 + 0.3 * draw[0]) * last  # new position of the moved step
    source = (to + (0.6 * draw[1] - 0.3) * last).clamp(min=0)
    before = steps * source / to.clamp(min=1e-6)
    after = source + (steps - to) * (last - source) / (last - to).clamp(min=1e-6)
    position = torch.minimum(torch.where(steps <= to, before, after), last).clamp(min=0)
    low = position.floor().long()
    high = torch.minimum(low + 1, last.long())
    part = (position - low)[..., None]
    wide = x.shape[2]
    first, second = (x.gather(1, index[..., None].expand(-1, -1, wide)) for index in (low, high))
    warped = torch.lerp(first, second, part)
    return warped.masked_fill((steps >= lengths[:, None])[..., None], 0)


def _vector_view(x: Tensor, unique: bool, generator: Generator, mixing: bool = False) -> Tensor:
    noisy = x + 0.01 * _randn(x, generator)
    if unique:
        return _choose([noisy, x], generator)
    half = x.shape[1] // 2
    swapped = torch.cat([x[:, half:], x[:, :half]], 1)
    rank = torch.rand(x.shape, generator=generator).argsort(1).argsort(1)
    dropped = x * (rank >= round(0.1 * x.shape[1]))
    options = [swapped, noisy, dropped, x]
    return _choose([*options, cutmix(x, generator)] if mixing else options, generator)


def _sequence_view(x: Tensor, lengths: Tensor, generator: Generator, mixing: bool = False) -> Tensor:
    valid = torch.arange(x.shape[1]) < lengths[:, None]  # [B, T]
    # Padding sorts last, so that the order permutes each sequence within its own length.
    order = (torch.rand(valid.shape, generator=generator) + (~valid).float() * 2).argsort(1)
    permuted = x.gather(1, order[..., None].expand_as(x))
    noisy = (x + 0.1 * _randn(x, generator)) * valid[..., None]
    dropped = x * (order.argsort(1) >= (lengths // 5)[:, None])[..., None]
    options = [permuted, noisy, dropped, x]
    return _choose([*options, time_warp(x, lengths, generator)] if mixing else options, generator)


def _still_noise(x: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
    """Noise 0.1 on the half of each sequence's frames that move least: Table 5's "noise on silent frames"."""
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    motion = torch.zeros(valid.shape)
    motion[:, 1:] = (x[:, 1:] - x[:, :-1]).norm(dim=2)
    rank = motion.masked_fill(~valid, torch.inf).argsort(1).argsort(1)
    still = (rank < (lengths // 2)[:, None]) & valid
    return x + 0.1 * _randn(x, generator) * still[..., None]


def _image_view(x: Tensor, shape: tuple[int, int], shift: bool, generator: Generator) -> Tensor:
    rows = len(x)
    images = x.reshape(rows, *shape)
    if shift:
        padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
        top, left = torch.randint(3, (2, rows, 1, 1), generator=generator)
        down, across = torch.arange(shape[0])[None, :, None], torch.arange(shape[1])[None, None, :]
        images = padded[torch.arange(rows)[:, None, None], top + down, left + across]
    gain = 0.6 + 0.8 * torch.rand(rows, 1, 1, generator=generator)
    return (images * gain + 0.05 * _randn(images, generator)).reshape(rows, -1)
