"""Autograd of attention over a list of directed pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

# causal_offset, scale and dropout_p of every pair; sparse
Rule = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], bool]


def _thirds(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    n = len(tensors) // 3
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])


def by_definition(
    rule: Rule, seed: Tensor, lengths: tuple[Sequence[Tensor], Sequence[Tensor]], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The materialised formula for every pair."""
    offsets, scales, dropouts, sparse = rule
    pairs: Any = zip(
        *_thirds(tensors), *lengths, offsets, scales, dropouts, seed.unbind(), [sparse] * len(scales), strict=True
    )
    return [reference.attention(*pair)[0] for pair in pairs]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, backend: str, seed: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(tensors) // 5
        lengths, inputs = (list(tensors[:n]), list(tensors[n : 2 * n])), tensors[2 * n :]
        offsets, scales, dropouts, sparse = rule
        found = torch.ops.mi_kernels.cross_attention_forward(
            *_thirds(inputs), *lengths, offsets, scales, dropouts, seed, sparse, backend
        )
        ctx.save_for_backward(seed, *tensors, *found)
        ctx.rule, ctx.backend = rule, backend
        return tuple(found[:n])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(grads)
        seed, *saved = ctx.saved_tensors
        lengths, inputs = (saved[:n], saved[n : 2 * n]), saved[2 * n : 5 * n]
        needed = ctx.needs_input_grad[3 + 2 * n :]
        none = (None,) * (3 + 2 * n)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *none, *_differentiable_gradients(ctx.rule, seed, lengths, inputs, needed, grads)
        offsets, scales, dropouts, sparse = ctx.rule
        found = torch.ops.mi_kernels.cross_attention_backward(
            list(grads),
            *_thirds(inputs),
            saved[5 * n : 6 * n],
            saved[6 * n :],
            *lengths,
            offsets,
            scales,
            dropouts,
            seed,
            sparse,
            ctx.backend,
        )
        return *none, *(g if need else None for g, need in zip(found, needed, strict=True))


def _differentiable_gradients(
    rule: Rule,
    seed: Tensor,
    lengths: tuple[Sequence[Tensor], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """First-order gradients that can be differentiated again; materialises the scores."""
    # Aliases: a tensor that serves twice must not collect the sum of both gradients.
    aliases = [t.view_as(t) for t in inputs]
    outs = by_definition(rule, seed, lengths, aliases)
    targets = [a for a, need in zip(aliases, needed, strict=True) if need]
    used = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in used], targets, [g for _, g in used], create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needed]


def attention(
    rule: Rule,
    backend: str,
    seed: Tensor,
    lengths: tuple[Sequence[Tensor], Sequence[Tensor]],
    inputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Outs of every pair, differentiable; `inputs` are all queries, all keys, all values. Nothing of size Tq Tk is
    kept."""
    tensors = [*lengths[0], *lengths[1], *inputs]
    if torch.compiler.is_compiling():  # dynamo takes no tensor twice; in self-attention one is key and value
        tensors = [t.view_as(t) if any(t is u for u in tensors[:i]) else t for i, t in enumerate(tensors)]
    return _Attention.apply(rule, backend, seed, *tensors)
