"""Autograd of attention over a list of directed pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import transforms
from ..common.autograd import differentiable_gradients, needs_formula
from . import dispatch, reference
from .problem import Pairs, Results, Rule


def by_definition(rule: Rule, pairs: Pairs) -> list[Tensor]:
    """The materialised formula for every pair."""
    return [reference.attention(pair)[0] for pair in pairs.each(rule)]


def weights(rule: Rule, pairs: Pairs) -> list[Tensor]:
    """The normalised weights of every pair after dropout, [B, heads, Tq, Tk] in the accumulation type."""
    return [reference.weights(pair) for pair in pairs.each(rule)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, numbers: Tensor | None, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        pairs = Pairs.of(tensors)
        if numbers is None:
            found = dispatch.forward(pairs, rule, backend)
        else:
            run: Any = torch.ops.mi_kernels.cross_attention_forward
            found = run(*pairs, rule.causal_offset, numbers, rule.sparse, backend)
        ctx.save_for_backward(*tensors, *found, numbers)
        ctx.rule, ctx.backend = rule, backend
        return tuple(found[: len(pairs.query)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, rule = len(grads), ctx.rule
        *tensors, numbers = ctx.saved_tensors
        results = Results(tensors[-2 * n : -n], tensors[-n:])
        tensors = tensors[: -2 * n]
        pairs, needed = Pairs.of(tensors), ctx.needs_input_grad[3 : 3 + 3 * n]
        none, others = (None,) * 3, (None,) * (2 * n + 1)
        if needs_formula(grads):
            formula = lambda *t: by_definition(rule, Pairs.of([*t, *tensors[3 * n :]]))  # noqa: E731
            return *none, *differentiable_gradients(formula, tensors[: 3 * n], needed, grads), *others
        if numbers is None:
            found = dispatch.backward(list(grads), pairs, results, rule, ctx.backend)
        else:
            run: Any = torch.ops.mi_kernels.cross_attention_backward
            found = run(list(grads), *pairs, *results, rule.causal_offset, numbers, rule.sparse, ctx.backend)
        return *none, *(g if need else None for g, need in zip(found, needed, strict=True)), *others


def attention(rule: Rule, backend: str, pairs: Pairs) -> Sequence[Tensor]:
    """The differentiable outputs of every pair. Only the reference keeps tensors of size Tq Tk."""
    if transforms.active():
        run, formula = partial(_run, backend), by_definition
        operator = transforms.Operator(partial(_on_lead, run, rule), partial(_on_lead, formula, rule))
        return transforms.apply(operator, *pairs.flat())
    return _run(backend, rule, pairs)


def _run(backend: str, rule: Rule, pairs: Pairs) -> Sequence[Tensor]:
    if backend == "reference":
        return by_definition(rule, pairs)
    tensors = pairs.flat()
    if not torch.compiler.is_compiling():
        return _Attention.apply(rule, None, backend, *tensors)
    # torch.compile recompiles for each value of a float, so floats are passed in a tensor. It also rejects a tensor
    # that is passed twice, as in self-attention.
    scalar = lambda x: torch.full((), x, dtype=torch.float64)  # noqa: E731
    numbers = torch.stack([scalar(x) for x in (*rule.scale, *rule.dropout_p)]).view(2, -1)
    tensors = [t.view_as(t) if any(t is u for u in tensors[:i]) else t for i, t in enumerate(tensors)]
    return _Attention.apply(rule._replace(scale=(), dropout_p=()), numbers, backend, *tensors)


def _on_lead(
    run: Callable[[Rule, Pairs], Sequence[Tensor]], rule: Rule, lead: tuple[int, ...], *tensors: Tensor
) -> list[Tensor]:
    """`run` on tensors with the leading dimensions `lead`, one for each vmap around the operator.

    Without dropout they join the items of the batch. What is dropped depends on an item's place in the batch, so with
    dropout every element of `lead` becomes a pair of its own, with its own seed.
    """
    if not lead:
        return list(run(rule, Pairs.of(tensors)))
    d, count = len(lead), torch.Size(lead).numel()
    if not any(rule.dropout_p):
        *rest, seed = tensors
        outs = run(rule, Pairs.of([*(t.flatten(0, d) for t in rest), seed[(0,) * d]]))
        return [o.unflatten(0, (*lead, -1)) for o in outs]
    single = [t.flatten(0, d - 1).unbind() for t in tensors[:-1]]
    repeated = rule._replace(
        causal_offset=[c for c in rule.causal_offset for _ in range(count)],
        scale=[s for s in rule.scale for _ in range(count)],
        dropout_p=[p for p in rule.dropout_p for _ in range(count)],
    )
    seeds = tensors[-1].flatten(0, d - 1).mT.flatten()  # [pairs x lead]
    outs = run(repeated, Pairs.of([*(t for each in single for t in each), seeds]))
    return [torch.stack(list(outs[i : i + count])).unflatten(0, lead) for i in range(0, len(outs), count)]
