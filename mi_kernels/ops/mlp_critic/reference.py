"""The definition: every score materialised, plain torch, ordinary autograd.

2 G B N sum_l H_l H_{l+1} FLOPs forward, twice that backward; G B N sum_l H_l activations are kept for the
backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .schema import accumulator


def apply_layers(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    """The MLP after its first layer: pre-activations [G, P, H_1] -> scores [G, P]."""
    act = ACTIVATIONS[activation].apply
    h = act(h)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = act(h @ weight.mT + bias.unsqueeze(-2))
    dtype = accumulator(h.dtype)
    return ((h.to(dtype) @ weights[-1].to(dtype).mT) + biases[-1].to(dtype).unsqueeze(-2)).squeeze(-1)


def scores(
    u: Tensor, v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str
) -> Tensor:
    """S [G, B, N] of u [G, B, H_1] and v [G, N, H_1]."""
    pairs = (u.unsqueeze(2) + v.unsqueeze(1)).flatten(1, 2)
    return apply_layers(pairs, weights, biases, activation).unflatten(1, (u.shape[1], v.shape[1]))


def reduce_scores(s: Tensor, off_diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`positive`, `row_lse`, `col_lse`, `row_sum` of materialised scores [G, B, N], as schema.py defines
    them."""
    square = s.shape[1] == s.shape[2]
    positive = s.diagonal(dim1=1, dim2=2) if square else s[:, :0, 0]
    if not off_diagonal:
        return positive, s.logsumexp(2), s.logsumexp(1), s.sum(2)
    if s.shape[1] == 1:
        nothing = s.sum(2) * 0
        return positive, nothing - torch.inf, nothing - torch.inf, nothing
    diagonal = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    masked = s.masked_fill(diagonal, -torch.inf)
    return positive, masked.logsumexp(2), masked.logsumexp(1), s.masked_fill(diagonal, 0).sum(2)


def statistics(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    off_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four statistics, through a materialised S."""
    return reduce_scores(scores(u, v, weights, biases, activation), off_diagonal)
