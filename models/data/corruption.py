"""Corrupts batches: removes modalities or frames, adds noise, or sets values to zero.

The random numbers are hashes of (seed, epoch, kind of corruption, modality, row, position). They do not depend on the
batch that contains a row, on padding or on other modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.batch import Batch, Inputs

if TYPE_CHECKING:
    from models.data.dataset import Dataset

ALL = "*"
KINDS = ("drop", "frames", "noise", "zeros")
SALTS = {kind: salt for salt, kind in enumerate((*KINDS, "angle", "spared"), 1)}


@dataclass(frozen=True)
class CorruptionConfig:
    """Rates and deviations by modality name; "*" applies to all modalities that are not named.

    drop: probability that a row loses the modality; every row keeps at least one.
    frames: probability of removing a frame or token. The gap is closed, and at least one frame remains.
    noise: standard deviation of normal noise on every value of vectors and frames (standardised inputs have deviation
        1).
    zeros: probability that a value of a vector or frame, or a token, becomes 0.
    """

    drop: dict[str, float] = field(default_factory=dict)
    frames: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            for name, value in getattr(self, kind).items():
                if not 0 <= value or (kind != "noise" and value > 1):
                    accepted = "not be negative" if kind == "noise" else "lie in [0, 1]"
                    raise ValueError(f"{kind} of {name} must {accepted}, got {value}")

    def of(self, kind: str, name: str) -> float:
        rates: dict[str, float] = getattr(self, kind)
        return rates.get(name, rates.get(ALL, 0.0))

    @property
    def active(self) -> bool:
        return any(value > 0 for kind in KINDS for value in getattr(self, kind).values())

    def check(self, data: Dataset) -> None:
        """Raises ValueError for a modality that the data does not have, or that the corruption would not change."""
        for kind in KINDS:
            for name in getattr(self, kind):
                if name == ALL:
                    continue
                if name not in data.names:
                    raise ValueError(f"{kind} names modality {name!r}; the data has {', '.join(data.names)}")
                if kind == "frames" and not data[name].is_sequence:
                    raise ValueError(f"frames names modality {name!r}, which has no frames; use drop or zeros")
                if kind == "noise" and data[name].is_tokens:
                    raise ValueError(f"noise names modality {name!r}, which holds tokens; use drop, frames or zeros")


def corrupted(batch: Batch, config: CorruptionConfig, seed: int, epoch: int = 0, *, keep_one: bool = True) -> Batch:
    """Returns the batch with corrupted inputs; views are unchanged.

    With ``keep_one`` a row never loses its last modality. Without it, drop = 1 removes the modality from every row.
    """
    if not config.active:
        return batch
    inputs = {}
    gone = _dropped(batch, config, seed, epoch, keep_one)
    for index, (name, x) in enumerate(batch.inputs.items()):
        rates = {kind: config.of(kind, name) for kind in KINDS}
        draw = _Draws(seed, epoch, index, batch.rows)
        inputs[name] = without(_damaged(x, rates, draw), gone[name])
    return batch._replace(inputs=inputs)


def without(x: Inputs, gone: Tensor) -> Inputs:
    """``x`` with the rows of the bool mask ``gone`` [B] missing: zeros, length 0, not present."""
    if not bool(gone.any()):
        return x
    values = x.values.masked_fill(gone.reshape(-1, *[1] * (x.values.dim() - 1)), 0)
    lengths = x.lengths
    if lengths is None and (x.values.dim() == 3 or not x.values.is_floating_point()):
        lengths = x.steps()
    return Inputs(values, None if lengths is None else lengths.masked_fill(gone, 0), x.mask() & ~gone)


class _Draws:
    """Uniform numbers in (0, 1) for [B] rows and any number of positions."""

    def __init__(self, seed: int, epoch: int, modality: int, rows: Tensor):
        key = reduce(lambda k, part: _mixed(k ^ _mixed(torch.tensor(part))), (seed, epoch, modality), torch.tensor(17))
        self.rows = _mixed(key ^ _mixed(rows.cpu()))

    def uniform(self, kind: str, positions: int = 1) -> Tensor:
        """[B, positions]."""
        salt = _mixed(torch.tensor(SALTS[kind]))
        place = _mixed(torch.arange(positions) + 1)
        bits = _mixed(_mixed(self.rows ^ salt)[:, None] ^ place)
        return ((bits >> 11) & ((1 << 53) - 1)).double().add(0.5) / (1 << 53)

    def normal(self, positions: int) -> Tensor:
        first, second = self.uniform("noise", positions), self.uniform("angle", positions)
        return ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).float()


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap around."""
    x = x + -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _dropped(batch: Batch, config: CorruptionConfig, seed: int, epoch: int, keep_one: bool) -> Mapping[str, Tensor]:
    here, gone = [], []
    for index, (name, x) in enumerate(batch.inputs.items()):
        here.append(x.mask().cpu())
        gone.append(_Draws(seed, epoch, index, batch.rows).uniform("drop")[:, 0] < config.of("drop", name))
    has, lost = torch.stack(here, 1), torch.stack(gone, 1)  # [B, M]
    if keep_one:
        spare = torch.stack(
            [_Draws(seed, epoch, m, batch.rows).uniform("spared")[:, 0] for m in range(has.shape[1])], 1
        )
        kept = spare.masked_fill(~has, -1).argmax(1)
        empty = (has & ~lost).sum(1) == 0
        lost[empty, kept[empty]] = False
    device = batch.rows.device
    return {name: lost[:, m].to(device) for m, name in enumerate(batch.inputs)}


def _damaged(x: Inputs, rates: Mapping[str, float], draw: _Draws) -> Inputs:
    if rates["frames"] and (x.values.dim() == 3 or not x.values.is_floating_point()):
        x = _fewer_frames(x, rates["frames"], draw)
    values = x.values
    positions = values[0].numel() if len(values) else 0
    if rates["noise"] and values.is_floating_point():
        noise = draw.normal(positions).reshape(values.shape).to(values)
        values = values + rates["noise"] * noise * _inside(x)
    if rates["zeros"]:
        kept = draw.uniform("zeros", positions).reshape(values.shape).to(values.device) >= rates["zeros"]
        values = values * kept
    return Inputs(values, x.lengths, x.present)


def _fewer_frames(x: Inputs, rate: float, draw: _Draws) -> Inputs:
    steps = x.values.shape[1]
    lengths = x.steps()
    inside = torch.arange(steps, device=lengths.device) < lengths[:, None]
    kept = inside & (draw.uniform("frames", steps).to(lengths.device) >= rate)
    kept[:, 0] |= inside[:, 0] & ~kept.any(1)
    order = (~kept).to(torch.uint8).argsort(stable=True, dim=1)  # kept frames first, in their order
    index = order.reshape(*order.shape, *[1] * (x.values.dim() - 2)).expand_as(x.values)
    left = kept.sum(1)
    moved = Inputs(x.values.gather(1, index), left, x.present)
    return Inputs(moved.values * _inside(moved), left, x.present)


def _inside(x: Inputs) -> Tensor:
    """1 for values that are not padding and whose row has the modality, otherwise 0: [B, 1 ...]."""
    trailing = [1] * (x.values.dim() - 1)
    mask = x.mask().reshape(-1, *trailing).to(x.values.dtype)
    if x.lengths is None or x.values.dim() == 1:
        return mask
    within = torch.arange(x.values.shape[1], device=x.values.device) < x.lengths[:, None].to(x.values.device)
    return mask * within.reshape(*within.shape, *[1] * (x.values.dim() - 2)).to(x.values.dtype)
