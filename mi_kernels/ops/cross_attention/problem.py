"""What the attention operators take, by name; what the fields hold is said in schema.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """One directed pair and how it attends; the order is that of the kernels' arguments, which take lists."""

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
    """How the pairs of a call attend: one entry per pair, and whether all use sparsemax."""

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
        """From the flat list that autograd's functions take."""
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
    """What a forward returns: outs and statistics of all pairs."""

    out: list[Tensor]
    stat: list[Tensor]


class OperatorRule(NamedTuple):
    """A rule as torch's operators take it: scale and dropout_p in one tensor [2, pairs], because a float argument would
    be a constant of a compiled graph."""

    causal_offset: list[int]
    numbers: Tensor
    sparse: bool

    def rule(self) -> Rule:
        scale, dropout_p = self.numbers.tolist()
        return Rule(self.causal_offset, scale, dropout_p, self.sparse)
