"""What the MLP critic's operators take, by name. The order of the fields is that of the operators' arguments."""

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
    """What turns pre-activations of the first layer into counted scores, besides the parameters."""

    activation: str
    output: str
    off_diagonal: bool


class Request(NamedTuple):
    """What a forward computes: bits of statistics, the bound of clipped scores, whether it keeps for the backward."""

    stats: int
    clip: NumberTensor
    keep: bool


class LogSums(NamedTuple):
    """The log-sums that a forward computed, which the backward's exponentials are taken against."""

    row_lse: Tensor
    col_lse: Tensor


class Slopes(NamedTuple):
    """The gradients that arrive at the statistics; None where nothing flows back."""

    positive: Tensor | None
    row_lse: Tensor | None
    col_lse: Tensor | None
    row_sum: Tensor | None
    row_softplus: Tensor | None


class Kept(NamedTuple):
    """What a forward kept for the backward, or empty tensors."""

    scores: Tensor
    masks: Tensor


class Resources(NamedTuple):
    """Where an operator runs, and the bytes that it may take."""

    memory_budget: SymInt
    backend: str
