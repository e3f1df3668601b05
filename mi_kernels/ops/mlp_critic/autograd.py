"""Autograd of the MLP critic's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.shapes import grouped, reshaped
from . import dispatch
from .reference import statistics as reference_statistics
from .schema import PIECEWISE_LINEAR, kept_shapes


def flat(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """u, v, weights and biases in the operators' shapes."""
    u, v, *parameters = tensors
    n = len(parameters) // 2
    weights = [w if w.dim() == 3 else w.unsqueeze(0) for w in parameters[:n]]
    biases = [b if b.dim() == 2 else b.unsqueeze(0) for b in parameters[n:]]
    return grouped(u), grouped(v), weights, biases


def _rows(t: Tensor) -> Tensor:
    """A statistic, or its gradient, as [G, B]."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1]).contiguous()


def _gradient_rows(t: Tensor | None) -> Tensor | None:
    return None if t is None or not t.numel() else _rows(t)


def _differentiable_gradients(
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    score: tuple[str, str, bool],
) -> list[Tensor | None]:
    """First-order gradients that can be differentiated again; materialises the scores."""
    # Aliases: a tensor that serves twice must not collect the sum of both gradients.
    aliases = [t.view_as(t) for t in tensors]
    outputs = reference_statistics(*flat(aliases), *score)
    used = [(o, g) for o, g in zip(outputs, map(_gradient_rows, grads), strict=True) if g is not None]
    targets = [a for a, need in zip(aliases, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used], targets, [g for _, g in used], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        score: tuple[str, str, bool],
        stats: int,
        clip: float,
        keep: bool,
        memory_budget: int,
        backend: str,
        u: Tensor,
        v: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        critic = flat((u, v, *parameters))
        # Outside of a compiled graph the operator would only cost its way through the dispatcher.
        run: Any = torch.ops.mi_kernels.mlp_critic_forward if torch.compiler.is_compiling() else dispatch.forward
        *found, scores, masks = run(*critic, *score, stats, clip, keep, memory_budget, backend)
        outputs = [reshaped(t, (*u.shape[:-2], t.shape[-1])) for t in found]
        ctx.save_for_backward(u, v, outputs[1], outputs[2], scores, masks, *parameters)
        ctx.score, ctx.memory_budget, ctx.backend = score, memory_budget, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[5])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v, row_lse, col_lse, scores, masks, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        none = (None,) * 6
        if all(g is None for g in grads):
            return *none, *((None,) * len(needed))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *none, *_differentiable_gradients((u, v, *parameters), needed, grads[:5], ctx.score)
        run: Any = torch.ops.mi_kernels.mlp_critic_backward if torch.compiler.is_compiling() else dispatch.backward
        tensors = (u, v, *parameters)
        found = run(
            *flat(tensors),
            *ctx.score,
            _rows(row_lse),
            _rows(col_lse),
            *map(_gradient_rows, grads[:5]),
            scores,
            masks,
            any(needed[2:]),
            ctx.memory_budget,
            ctx.backend,
        )
        gradients = [reshaped(g, t.shape) for g, t in zip(found, tensors, strict=False)]
        return *none, *gradients, *((None,) * (len(tensors) - len(gradients)))


def statistics(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    score: tuple[str, str, bool],
    *,
    stats: int,
    clip: float,
    memory_budget: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """The statistics of schema.py, differentiable, [*, B] each; `score` is (activation, output, off_diagonal).

    u [*, B, H_1], v [*, N, H_1]; weights and biases as torch.nn.Linear has them or with a group dimension.

    The compiled backends and Triton keep scores and ReLU bits for the backward where they fit `memory_budget`: 3 M
    FLOPs instead of 4 M.
    """
    tensors = (u, v, *weights, *biases)
    keep = (
        backend in ("cpu", "triton", "cuda")
        and len(weights) == 2
        and score[0] in PIECEWISE_LINEAR
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
    )
    if keep:
        groups = u.shape[:-2].numel()
        shapes = kept_shapes(groups, u.shape[-2], v.shape[-2], weights[0].shape[-2], backend)
        scores, masks = (torch.Size(shape).numel() for shape in shapes)
        keep = scores * (8 if u.dtype == torch.float64 else 4) + masks * 4 <= memory_budget
    out: tuple[Tensor, ...] = _Statistics.apply(score, stats, clip, keep, memory_budget, backend, *tensors)
    return out
