"""Pre-norm transformer encoders whose keys may come from another sequence, as MulT builds them.

With x the target [B, Tq, d], s the source [B, Tk, d] and LN_0, LN_1 two layer norms, one layer is

    x <- x + Drop(Attention(LN_0(x), LN_0(s), LN_0(s)))        the source is always the embedded input, not a state
    x <- x + Drop(W_2 Drop(ReLU(W_1 LN_1(x))))                 W_1 [4 d, d], W_2 [d, 4 d]

(Tsai et al., ACL 2019, arXiv 1906.00295, eq. 3-4). Without a source the target attends to itself. Several encoders of
equal depth run layer by layer side by side, so that their attentions are one call.

Cost of a layer per item, forward: (20 Tq + 4 Tk) d^2 FLOP of projections, 4 Tq Tk d FLOP of attention. For the backward
pass about (10 Tq + 3 Tk) d numbers are kept (without dropout), and no score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Inputs
from models.layers.attention import Projected, Visible, attend
from models.layers.dropout import dropout
from models.layers.lengths import last_step


@dataclass(frozen=True)
class Dropouts:
    """Rates of an encoder: ``embed`` after the positions, ``attention`` on the weights, ``relu`` and ``residual``."""

    embed: float = 0.0
    attention: float = 0.0
    relu: float = 0.0
    residual: float = 0.0

    def __post_init__(self) -> None:
        for name in ("embed", "attention", "relu", "residual"):
            check_rate(name, getattr(self, name))


def check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be a dropout rate, at least 0 and below 1, got {rate}")


def check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"heads must divide dim {dim}, got {heads}")


def sinusoids(steps: int, dim: int, like: Tensor) -> Tensor:
    """Rows for positions 1 to ``steps``, [steps, dim]: sines of all frequencies, then cosines; position 0 means none.

    The frequencies are 10000^(-i / (dim // 2 - 1)); an odd dim has a last column of zeros (as tensor2tensor and
    fairseq have it, which is not the interleaved form of Vaswani et al.).
    """
    half = dim // 2
    rate = math.log(10000.0) / max(half - 1, 1)
    frequency = torch.exp(torch.arange(half, device=like.device, dtype=torch.float64) * -rate)
    angle = torch.arange(1, steps + 1, device=like.device, dtype=torch.float64)[:, None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim % 2)).to(like.dtype)


def embed(x: Tensor, positions: str) -> Tensor:
    """sqrt(d) x plus positions: every step's ("steps"), only where channel 0 is not zero ("nonzero"), or "none"."""
    scaled = math.sqrt(x.shape[2]) * x
    if positions == "none":
        return scaled
    table = sinusoids(x.shape[1], x.shape[2], x)
    return scaled + (table if positions == "steps" else table * (x[..., :1] != 0))


class TransformerLayer(nn.Module):
    """One pre-norm layer; the target's norm serves the source as well. 12 d^2 + 13 d parameters."""

    def __init__(self, dim: int, heads: int, dropouts: Dropouts | None = None):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.dropouts = heads, dropouts or Dropouts()
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        for linear in (self.out_proj, self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def project(self, target: Tensor, keys: Tensor, values: Tensor) -> Projected:
        """Queries [B, heads, Tq, E], keys and values [B, heads, Tk, E]; what shares an input is one product."""
        dim = target.shape[2]
        sizes = (1, 1, 1) if values is not keys else (1, 2) if keys is not target else (3,)
        weights, biases = (t.split([n * dim for n in sizes]) for t in (self.in_proj_weight, self.in_proj_bias))
        parts: list[Tensor] = []
        for x, weight, bias, n in zip((target, keys, values), weights, biases, sizes, strict=False):
            parts += F.linear(self.norm_attention(x), weight, bias).chunk(n, 2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def finish(self, target: Tensor, attended: Tensor) -> Tensor:
        """The residual sums of the attention [B, heads, Tq, E] and of the feed-forward part."""
        rates = self.dropouts
        x = self.out_proj(attended.transpose(1, 2).flatten(2))
        x = target + dropout(x, rates.residual, self.training)
        hidden = dropout(self.expand(self.norm_feedforward(x)).relu(), rates.relu, self.training)
        return x + dropout(self.contract(hidden), rates.residual, self.training)


class TransformerStack(nn.Module):
    """``layers`` TransformerLayers and a last LayerNorm: target [B, Tq, d] to [B, Tq, d].

    Takes raw features: the sqrt(d) factor, the positions (as in ``embed``) and their dropout are applied here. Steps at
    or beyond a target's length come out finite and without meaning. Parameters: layers (12 d^2 + 13 d) + 2 d.
    """

    def __init__(self, dim: int, heads: int, layers: int, dropouts: Dropouts | None = None, positions: str = "steps"):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if positions not in ("steps", "nonzero", "none"):
            raise ValueError(f"positions must be steps, nonzero or none, got {positions!r}")
        self.positions, self.dropouts = positions, dropouts or Dropouts()
        self.layers = nn.ModuleList([TransformerLayer(dim, heads, dropouts) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, target: Inputs, source: Inputs | None = None, causal: bool = False) -> Tensor:
        """``causal``: MulT's mask, j <= i + |Lk - Lq|; the usual one without a source."""
        visible = Visible.between(target, target if source is None else source, causal)
        return run_together([self], [target.values], [None if source is None else source.values], [visible])[0]


def run_together(
    stacks: nn.ModuleList | Sequence[TransformerStack],
    targets: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    visible: Sequence[Visible],
    last_only: bool = False,
) -> list[Tensor]:
    """Each stack on its target and source (None: the target itself), all attentions of a layer in one call.

    With ``last_only`` the results are the states [B, 1, d] of each target's last step alone: the last layer computes
    no other. That step sees every key of its sequence, so no causal offset is left.
    """
    stacks = cast(list[TransformerStack], list(stacks))
    if len({len(stack.layers) for stack in stacks}) > 1:
        raise ValueError("stacks that run together must have the same number of layers")
    embedded: list[tuple[Tensor, str, Tensor]] = []

    def dropped(stack: TransformerStack, x: Tensor) -> Tensor:
        found = next((e for y, positions, e in embedded if y is x and positions == stack.positions), None)
        if found is None:
            found = embed(x, stack.positions)
            embedded.append((x, stack.positions, found))
        rate = stack.dropouts.embed if stack.training else 0.0
        return dropout(found, rate) if rate else found

    states, fixed = [], []
    for stack, target, source in zip(stacks, targets, sources, strict=True):
        states.append(dropped(stack, target))
        # Keys and values have dropout masks of their own, as in the public code.
        masked = stack.training and stack.dropouts.embed > 0
        keys = None if source is None else dropped(stack, source)
        fixed.append((keys, dropped(stack, source) if masked and source is not None else keys))
    depth = len(stacks[0].layers)
    for index in range(depth):
        layers = [cast(TransformerLayer, stack.layers[index]) for stack in stacks]
        states = _layer(layers, states, fixed, visible, last_only and index == depth - 1)
    return [stack.norm(x) for stack, x in zip(stacks, states, strict=True)]


def _layer(
    layers: Sequence[TransformerLayer],
    states: list[Tensor],
    fixed: Sequence[tuple[Tensor | None, Tensor | None]],
    visible: Sequence[Visible],
    last: bool,
) -> list[Tensor]:
    projected = []
    if last:
        targets = [last_step(x, v.target_lengths)[:, None] for x, v in zip(states, visible, strict=True)]
        visible = [Visible(None, v.source_lengths, None) for v in visible]
    else:
        targets = states
    for layer, target, x, (keys, values) in zip(layers, targets, states, fixed, strict=True):
        projected.append(layer.project(target, x if keys is None else keys, x if values is None else values))
    rates = [layer.dropouts.attention if layer.training else 0.0 for layer in layers]
    attended = attend(projected, visible, rates)
    return [layer.finish(x, a) for layer, x, a in zip(layers, targets, attended, strict=True)]
