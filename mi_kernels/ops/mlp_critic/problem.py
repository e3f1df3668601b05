"""The arguments of the MLP critic's operators as named tuples. The fields have the order of the operators'
arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common.arguments import NumberTensor, SymInt


class Critic(NamedTuple):
    """An MLP on pairs after its separable first layer; shapes as in schema.py."""

    u: Tensor
    v: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs that have gradients, in the order that operators return them."""
        return (self.u, self.v, *self.weights, *self.biases)


class Score(NamedTuple):
    """How scores are computed from the pre-activations of the first layer, besides the parameters, and which pairs
    count."""

    activation: str
    output: str
    off_diagonal: bool


class Request(NamedTuple):
    """What forward computes: bits of the statistics, the clipping bound, and whether it saves tensors for backward."""

    stats: int
    clip: NumberTensor
    keep: bool


class LogSums(NamedTuple):
    """The log-sum-exps of the forward pass, which normalise the exponentials in backward."""

    row_lse: Tensor
    col_lse: Tensor


class Slopes(NamedTuple):
    """The incoming gradients of the statistics; None for zero."""

    positive: Tensor | None
    row_lse: Tensor | None
    col_lse: Tensor | None
    row_sum: Tensor | None
    row_softplus: Tensor | None


class Kept(NamedTuple):
    """The tensors that forward saved for backward, or empty tensors."""

    scores: Tensor
    masks: Tensor


class Resources(NamedTuple):
    """The backend of an operator and its memory budget in bytes."""

    memory_budget: SymInt
    backend: str
