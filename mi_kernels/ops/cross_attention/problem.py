"""The arguments of the attention operators as named tuples. schema.py describes the fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """One directed pair with its attention parameters, in the order of the kernels' arguments (which take lists)."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_lengths: Tensor
    key_lengths: Tensor
    causal_offset: int
    scale: float
    dropout_p: float
    seed: Tensor
    sparse: bool


class Rule(NamedTuple):
    """The attention parameters of the pairs of a call, one entry per pair, and whether all use sparsemax."""

    causal_offset: Sequence[int]
    scale: Sequence[float]
    dropout_p: Sequence[float]
    sparse: bool


class Pairs(NamedTuple):
    """The tensors of a call, each a list with one entry per pair, and one seed per pair in one tensor."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    query_lengths: list[Tensor]
    key_lengths: list[Tensor]
    seed: Tensor

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Pairs:
        """Builds the tuple from the flat list that autograd functions take."""
        *rest, seed = tensors
        n = len(rest) // 5
        query, key, value, query_lengths, key_lengths = (list(rest[i * n : (i + 1) * n]) for i in range(5))
        return Pairs(query, key, value, query_lengths, key_lengths, seed)

    def flat(self) -> list[Tensor]:
        return [*self.query, *self.key, *self.value, *self.query_lengths, *self.key_lengths, self.seed]

    def each(self, rule: Rule) -> Iterator[Pair]:
        lists = (*self[:5], *rule[:3], self.seed.unbind())
        for entries in zip(*lists, strict=True):
            yield Pair(*(*entries, rule.sparse))


class Results(NamedTuple):
    """The results of a forward pass: outputs and statistics of all pairs."""

    out: list[Tensor]
    stat: list[Tensor]


class OperatorRule(NamedTuple):
    """The rule in the form of the torch operators: scale and dropout_p in one tensor [2, pairs], because torch.compile
    treats a float argument as a constant."""

    causal_offset: list[int]
    numbers: Tensor
    sparse: bool

    def rule(self) -> Rule:
        scale, dropout_p = self.numbers.tolist()
        return Rule(self.causal_offset, scale, dropout_p, self.sparse)
