"""Layers for critics and conditional densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ops.mlp_critic.activations import ACTIVATIONS


class MLP(nn.Module):
    """`nn.Linear` layers with the given widths, with `activation` after every layer except the last."""

    def __init__(self, widths: Sequence[int], activation: str):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            h = layer(ACTIVATIONS[self.activation].apply(h) if k else h)
        return h


class GroupedLinear(nn.Module):
    """G independent `nn.Linear` layers in one module: x [G, B, in] -> [G, B, out], weight [G, out, in], bias [G, out].
    Each is initialised like `nn.Linear`."""

    def __init__(self, groups: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(groups, out_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias.unsqueeze(-2)

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        return f"groups={groups}, in_features={in_features}, out_features={out_features}"
