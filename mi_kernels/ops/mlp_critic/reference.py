"""The definition of the MLP critic: materialised scores in plain torch with ordinary autograd.

2 G B N sum_l H_l H_{l+1} FLOP forward, twice that backward; G B N sum_l H_l activations are kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .activations import ACTIVATIONS
from .problem import Critic, Score


def softplus(s: Tensor) -> Tensor:
    """log(1 + exp s), accurate to the last bits of fp64. torch's softplus switches to the identity at 20."""
    return F.softplus(s, threshold=50)


def apply_layers(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, output: str
) -> Tensor:
    """The MLP after its first layer: pre-activations [G, P, H_1] -> scores [G, P]. Layers run in the dtype of the
    weights; the last layer and the scores are at least fp32."""
    act = ACTIVATIONS[activation].apply
    h = act(h.to(weights[0].dtype))
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = act(h @ weight.mT + bias.unsqueeze(-2))
    dtype = accumulate_dtype(h.dtype)
    s = ((h.to(dtype) @ weights[-1].to(dtype).mT) + biases[-1].to(dtype).unsqueeze(-2)).squeeze(-1)
    return softplus(s) if output == "softplus" else s


def scores(critic: Critic, activation: str, output: str) -> Tensor:
    """S [G, B, N] of u [G, B, H_1] and v [G, N, H_1]."""
    u, v, weights, biases = critic
    pairs = (u.unsqueeze(2) + v.unsqueeze(1)).flatten(1, 2)
    return apply_layers(pairs, weights, biases, activation, output).unflatten(1, (u.shape[1], v.shape[1]))


def reduce_scores(s: Tensor, off_diagonal: bool, clip: float | None = None) -> tuple[Tensor, ...]:
    """The statistics of materialised scores [G, B, N] in the order of schema.py; the clipped one is omitted if `clip`
    is None."""
    positive = s.diagonal(dim1=1, dim2=2) if s.shape[1] == s.shape[2] else s[:, :0, 0]
    clipped = () if clip is None else (s.detach().clamp(-clip, clip),)
    if not off_diagonal:
        return (positive, s.logsumexp(2), s.logsumexp(1), s.sum(2), softplus(s).sum(2)) + tuple(
            c.logsumexp(2) for c in clipped
        )
    if s.shape[1] == 1:
        nothing = s.sum(2) * 0
        empty = nothing - torch.inf
        return (positive, empty, empty, nothing, nothing, *(empty.detach() for _ in clipped))
    diagonal = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    masked = s.masked_fill(diagonal, -torch.inf)
    return (
        positive,
        masked.logsumexp(2),
        masked.logsumexp(1),
        s.masked_fill(diagonal, 0).sum(2),
        softplus(s).masked_fill(diagonal, 0).sum(2),
        *(c.masked_fill(diagonal, -torch.inf).logsumexp(2) for c in clipped),
    )


def statistics(critic: Critic, score: Score, clip: float | None = None) -> tuple[Tensor, ...]:
    """All statistics, from a materialised S."""
    return reduce_scores(scores(critic, score.activation, score.output), score.off_diagonal, clip)
