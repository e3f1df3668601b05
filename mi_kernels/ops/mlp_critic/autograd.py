"""Autograd of the MLP critic's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.autograd import differentiable_gradients, needs_formula
from ..common.shapes import grouped, reshaped
from ..common.statistics import STATISTICS
from . import dispatch, reference
from .problem import Critic, Kept, LogSums, Request, Resources, Score, Slopes
from .schema import BITS, PIECEWISE_LINEAR, kept_shapes

DIFFERENTIABLE = 5  # number of statistics with a gradient: all except the last, the clipped log-sum-exp


def flat(tensors: Sequence[Tensor]) -> Critic:
    """u, v, weights and biases, in the operators' shapes."""
    u, v, *parameters = tensors
    n = len(parameters) // 2
    weights = [w if w.dim() == 3 else w.unsqueeze(0) for w in parameters[:n]]
    biases = [b if b.dim() == 2 else b.unsqueeze(0) for b in parameters[n:]]
    return Critic(grouped(u), grouped(v), weights, biases)


def _rows(t: Tensor) -> Tensor:
    """A statistic, or its gradient, as [G, B]."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1]).contiguous()


def _gradient_rows(t: Tensor | None) -> Tensor | None:
    return None if t is None or not t.numel() else _rows(t)


class _StatisticsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        score: Score,
        stats: int,
        clip: float | Tensor,
        keep: bool,
        memory_budget: int,
        backend: str,
        u: Tensor,
        v: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        critic = flat((u, v, *parameters))
        request, resources = Request(stats, clip, keep), Resources(memory_budget, backend)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            run: Any = torch.ops.mi_kernels.mlp_critic_forward
            *found, scores, masks = run(*critic, *score, *request, *resources)
        else:  # a direct call avoids the cost of torch's dispatcher
            *found, scores, masks = dispatch.forward(critic, score, request, resources)
        outputs = [reshaped(t, (*u.shape[:-2], t.shape[-1])) for t in found]
        ctx.save_for_backward(u, v, outputs[1], outputs[2], scores, masks, *parameters)
        ctx.score, ctx.resources = score, resources
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[DIFFERENTIABLE])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v, row_lse, col_lse, scores, masks, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        none = (None,) * 6
        slopes = Slopes(*(_gradient_rows(g) for g in grads[:DIFFERENTIABLE]))
        tensors = (u, v, *parameters)
        if all(g is None for g in slopes):
            return *none, *((None,) * len(needed))
        if needs_formula(slopes):
            formula = lambda *t: reference.statistics(flat(t), ctx.score)  # noqa: E731
            return *none, *differentiable_gradients(formula, tensors, needed, slopes)
        sums, kept, resources = LogSums(_rows(row_lse), _rows(col_lse)), Kept(scores, masks), ctx.resources
        need_parameters = any(needed[2:])
        found: Sequence[Tensor]
        if torch.compiler.is_compiling():
            run: Any = torch.ops.mi_kernels.mlp_critic_backward
            found = run(*flat(tensors), *ctx.score, *sums, *slopes, *kept, need_parameters, *resources)
        else:
            found = dispatch.backward(flat(tensors), ctx.score, sums, slopes, kept, need_parameters, resources)
        gradients = [reshaped(g, t.shape) for g, t in zip(found, tensors[: len(found)], strict=True)]
        return *none, *gradients, *((None,) * (len(tensors) - len(gradients)))


def _keeps(tensors: Sequence[Tensor], score: Score, memory_budget: int, backend: str) -> bool:
    """Whether forward saves scores and bits, so that backward costs 2 M FLOP instead of 3 M."""
    u, v, *parameters = tensors
    kernel = backend in ("cpu", "triton", "cuda") and len(parameters) == 4 and score.activation in PIECEWISE_LINEAR
    if not (kernel and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    groups, width = u.shape[:-2].numel(), parameters[0].shape[-2]
    shapes = kept_shapes(groups, u.shape[-2], v.shape[-2], width, backend)
    scores, masks = (torch.Size(shape).numel() for shape in shapes)
    return scores * (8 if u.dtype == torch.float64 else 4) + masks * 4 <= memory_budget


def statistics(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    score: Score,
    *,
    stats: int,
    clip: float,
    memory_budget: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """The differentiable statistics of schema.py, [*, B] each.

    u [*, B, H_1], v [*, N, H_1]; weights and biases as in torch.nn.Linear, or with a group dimension.
    """
    tensors = (u, v, *weights, *biases)
    keep = _keeps(tensors, score, memory_budget, backend)
    bound = torch.full((), clip, dtype=torch.float64) if torch.compiler.is_compiling() else clip
    out: tuple[Tensor, ...] = _StatisticsFunction.apply(score, stats, bound, keep, memory_budget, backend, *tensors)
    return out


def _as_groups(lead: tuple[int, ...], tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.Size]:
    """Folds the dimensions `lead` of tensors [lead, ...] into the groups, u [lead x groups, B, H_1] and so on; also
    returns the unfolded shape [lead, *].

    Parameters that are only expanded along `lead` stay shared, unless a parameter needs a gradient, which differs
    between copies.
    """
    u, v, *parameters = tensors
    d, batch = len(lead), u.shape[:-2]
    groups = batch[d:].numel()
    n = len(parameters) // 2
    flattened = [u.flatten(0, -3), v.flatten(0, -3)]
    for k, p in enumerate(parameters):
        own = p if p.dim() - d == (3 if k < n else 2) else p.unsqueeze(d)  # [lead, 1 or G, ...]
        expanded = not any(p.stride()[:d]) and own.shape[d] == 1
        if expanded and not any(t.requires_grad for t in parameters):
            flattened.append(own[(0,) * d])
        else:
            flattened.append(own.expand(*lead, groups, *own.shape[d + 1 :]).flatten(0, d))
    return flattened, batch


def transformed(
    tensors: Sequence[Tensor], score: Score, *, stats: Sequence[str], clip: float, memory_budget: int, backend: str
) -> dict[str, Tensor]:
    """The named statistics, [*, B] each, under the active torch.func transforms; `tensors` are u, v, the weights and
    the biases. `positive` exists only for square batches."""

    def operator(wanted: Sequence[str]) -> transforms.Operator:
        bits = sum(bit for s, bit in BITS.items() if s in wanted)
        clipped = clip if "clipped_row_lse" in wanted else None

        def shaped(found: Sequence[Tensor], batch: torch.Size) -> list[Tensor]:
            by_name = dict(zip(STATISTICS[: len(found)], found, strict=True))
            return [by_name[s].reshape(*batch, by_name[s].shape[-1]) for s in wanted]

        def run(lead: tuple[int, ...], *given: Tensor) -> list[Tensor]:
            flattened, batch = _as_groups(lead, given) if lead else (list(given), given[0].shape[:-2])
            critic = flat(flattened)
            found: Sequence[Tensor]
            if backend == "reference":
                found = reference.statistics(critic, score, clipped)
            else:
                options = {"memory_budget": memory_budget, "backend": backend}
                found = statistics(*critic, score, stats=bits, clip=clipped or 0.0, **options)  # type: ignore[arg-type]
            return shaped(found, batch)

        def formula(lead: tuple[int, ...], *given: Tensor) -> list[Tensor]:
            flattened, batch = _as_groups(lead, given) if lead else (list(given), given[0].shape[:-2])
            return shaped(reference.statistics(flat(flattened), score, clipped), batch)

        return transforms.Operator(run, formula)

    wanted = [s for s in stats if s != "clipped_row_lse"]
    found = dict(zip(wanted, transforms.apply(operator(wanted), *tensors), strict=True)) if wanted else {}
    if "clipped_row_lse" in stats:
        still = [t.detach() for t in tensors]
        (found["clipped_row_lse"],) = transforms.apply(operator(["clipped_row_lse"]), *still)
    return found
