"""What the operators of the LSTM scan take, by name; shapes as in schema.py. The order of the fields is that of the
operators' arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scan(NamedTuple):
    """A scan over gates that are known."""

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
    """What a backward reads of the scan's inputs; neither the gates nor the bias."""

    weight: Tensor
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None


class Projection(NamedTuple):
    """What the backward of a layer reads besides."""

    x: Tensor
    weight_ih: Tensor


class States(NamedTuple):
    """What a forward leaves for the backward."""

    h: Tensor
    c: Tensor
    activations: Tensor


class Slopes(NamedTuple):
    """The gradients that arrive at the states; None where nothing flows back."""

    h: Tensor | None
    c: Tensor | None
