"""The arguments of the LSTM operators as named tuples; shapes are those of schema.py. The fields have the order of the
operators' arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scan(NamedTuple):
    """A scan over given gates."""

    gates: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[:-1]


class Layer(NamedTuple):
    """A scan whose gates are the projection of x."""

    x: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[:-1]

    def scan(self, gates: Tensor) -> Scan:
        """The scan over `gates`, the projected x."""
        return Scan(gates, self.weight_hh, self.bias, self.h0, self.c0, self.lengths)


class Start(NamedTuple):
    """The inputs of the scan that backward needs; neither the gates nor the bias."""

    weight: Tensor
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None


class Projection(NamedTuple):
    """Additional inputs of the backward pass of a layer."""

    x: Tensor
    weight_ih: Tensor


class States(NamedTuple):
    """Results of the forward pass that backward needs."""

    h: Tensor
    c: Tensor
    activations: Tensor


class Slopes(NamedTuple):
    """The incoming gradients of the states; None for zero."""

    h: Tensor | None
    c: Tensor | None
