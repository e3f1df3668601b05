"""Autograd of the MLP critic's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .reference import statistics as reference_statistics
from .schema import PIECEWISE_LINEAR, kept_shapes


def _differentiable_gradients(
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    score: tuple[str, str, bool],
) -> list[Tensor | None]:
    """First-order gradients that can be differentiated again; materialises the scores."""
    n = (len(tensors) - 2) // 2
    # Aliases: a tensor that serves twice must not collect the sum of both gradients.
    u, v, *parameters = aliases = [t.view_as(t) for t in tensors]
    outputs = reference_statistics(u, v, parameters[:n], parameters[n:], *score)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and g.numel()]
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
        n = len(parameters) // 2
        weights, biases = list(parameters[:n]), list(parameters[n:])
        # Outside of a compiled graph the operator would only cost its way through the dispatcher.
        run: Any = torch.ops.mi_kernels.mlp_critic_forward if torch.compiler.is_compiling() else dispatch.forward
        *outputs, scores, masks = run(
            u, v, weights, biases, *score, stats, clip, keep, memory_budget, backend
        )
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
        n = len(parameters) // 2
        run: Any = torch.ops.mi_kernels.mlp_critic_backward if torch.compiler.is_compiling() else dispatch.backward
        found = run(
            u,
            v,
            parameters[:n],
            parameters[n:],
            *ctx.score,
            row_lse,
            col_lse,
            *(None if g is None or not g.numel() else g.contiguous() for g in grads[:5]),
            scores,
            masks,
            any(needed[2:]),
            ctx.memory_budget,
            ctx.backend,
        )
        return *none, *found, *((None,) * (2 + len(parameters) - len(found)))


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
    """The statistics of schema.py, differentiable; `score` is (activation, output, off_diagonal).

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
        scores, masks = (torch.Size(shape).numel() for shape in kept_shapes(u, v, weights, backend))
        keep = scores * (8 if u.dtype == torch.float64 else 4) + masks * 4 <= memory_budget
    out: tuple[Tensor, ...] = _Statistics.apply(score, stats, clip, keep, memory_budget, backend, *tensors)
    return out
