"""Activations of an MLP critic, applied in place to a tile, and their derivatives from the saved tensors of the tile.

The derivatives of ReLU, leaky ReLU (slope 0.01), tanh, sigmoid and ELU are functions of their outputs, so a tile saves
one tensor per layer. For GELU and SiLU a tile saves the inputs and recomputes the activation if a weight gradient needs
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`apply` maps pre-activations to activations; `backward(grad, kept)` is the vector-Jacobian product."""

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    keeps_output: bool


ACTIVATIONS = {
    "relu": Activation(torch.relu, torch.relu_, lambda g, h: _aten.threshold_backward(g, h, 0), True),
    "leaky_relu": Activation(
        F.leaky_relu,
        lambda z: F.leaky_relu(z, inplace=True),
        lambda g, h: _aten.leaky_relu_backward(g, h, 0.01, True),
        True,
    ),
    "tanh": Activation(torch.tanh, torch.tanh_, _aten.tanh_backward, True),
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid_, _aten.sigmoid_backward, True),
    "elu": Activation(F.elu, lambda z: F.elu(z, inplace=True), lambda g, h: g * (h.clamp(max=0) + 1), True),
    "gelu": Activation(F.gelu, F.gelu, _aten.gelu_backward, False),
    "silu": Activation(F.silu, F.silu, _aten.silu_backward, False),
}
