"""Support of torch.func (grad, vmap, jvp and their compositions) and forward-mode differentiation for operators.

The ordinary autograd functions of the operators return gradients that were computed together with the value and keep
results of their kernels. This does not work with the nested levels of torch.func. While a transform is active, `apply`
therefore runs the operator through two functions in the form that torch.func needs. Values and first gradients still
come from the kernels, vmap becomes another group dimension, and second derivatives and forward mode use the torch
formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import Formula

Tensors = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Operator:
    """run(lead, *tensors) computes the outputs with kernels (once differentiable); formula(lead, *tensors) does so in
    torch.

    Every tensor argument and every output starts with the dimensions `lead`, one per surrounding vmap. Like group
    dimensions they index independent problems.
    """

    run: Formula
    formula: Formula
    lead: tuple[int, ...] = ()

    def values(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        # Forward mode does not accept custom functions whose outputs are views.
        return tuple(t.clone() if t._is_view() else t for t in self.run(self.lead, *tensors))

    def defined(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(self.formula(self.lead, *tensors))

    def under_vmap(self, size: int) -> Operator:
        return replace(self, lead=(size, *self.lead))


def active() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def apply(operator: Operator, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Runs the operator under the active transforms.

    Nested forward mode uses the formula directly, because the jvp of an autograd function sees only the values of the
    inner level and would lose the outer derivative.
    """
    outputs: tuple[Tensor, ...] = operator.defined(*tensors) if _forward_twice() else _Value.apply(operator, *tensors)
    return outputs


def _forward_twice() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def _leading(size: int, dims: Sequence[int | None], tensors: Tensors) -> list[Tensor | None]:
    """Moves the mapped dimension to the front; tensors without one are expanded."""
    return [
        None if t is None else t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _pullback(formula: Formula, tensors: Tensors, flags: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """Returns the differentiable linear map from gradients of the outputs to gradients of the flagged tensors."""
    chosen = [i for i, flag in enumerate(flags) if flag]

    def of_chosen(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return tuple(formula(*full))

    found: Callable[..., tuple[Tensor, ...]] = torch.func.vjp(of_chosen, *(tensors[i] for i in chosen))[1]
    return found


def _tangents(formula: Formula, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
    """Forward-mode derivative of a formula, computed as the transpose of its vector-Jacobian product."""
    pull = _pullback(formula, inputs, [v is not None for v in tangents])
    slopes = [torch.zeros_like(o) for o in formula(*inputs)]
    push = torch.func.vjp(lambda *s: pull(s), *slopes)[1]
    found: tuple[Tensor, ...] = push(tuple(v for v in tangents if v is not None))
    return found


class _Wanted:
    """The flags of inputs that need a gradient. A class, because functorch would flatten a tuple."""

    def __init__(self, flags: Sequence[bool]):
        self.flags = tuple(flags)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(operator: Operator, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return operator.values(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        found = iter(_Gradient.apply(ctx.operator, _Wanted(needed), *ctx.saved_tensors, *gradients))
        return None, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: Operator, *tensors: Tensor | None) -> Any:
        size = info.batch_size
        outputs = _Value.apply(operator.under_vmap(size), *_leading(size, in_dims[1:], tensors))
        return outputs, (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _tangents(ctx.operator.defined, ctx.saved_tensors, tangents)


class _Gradient(torch.autograd.Function):
    """Gradients of an operator's inputs for given output gradients; higher derivatives use the formula."""

    @staticmethod
    def forward(operator: Operator, wanted: _Wanted, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        needed = wanted.flags
        inputs, slopes = tensors[: len(needed)], tensors[len(needed) :]
        with torch.enable_grad():
            own = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)
            ]
            outputs = operator.values(*own)
            targets = [t for t, need in zip(own, needed, strict=True) if need and t is not None]
            return torch.autograd.grad(outputs, targets, slopes, materialize_grads=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator, wanted, *tensors = inputs
        ctx.needed = wanted.flags
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def formula(operator: Operator, needed: tuple[bool, ...]) -> Formula:
        def gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return _pullback(operator.defined, tensors[: len(needed)], needed)(tensors[len(needed) :])

        return gradients

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
        again = ctx.needs_input_grad[2:]
        found = iter(_pullback(_Gradient.formula(ctx.operator, ctx.needed), ctx.saved_tensors, again)(seconds))
        return None, None, *(next(found) if need else None for need in again)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], operator: Operator, wanted: _Wanted, *tensors: Tensor | None
    ) -> Any:
        size = info.batch_size
        found = _Gradient.apply(operator.under_vmap(size), wanted, *_leading(size, in_dims[2:], tensors))
        return found, (0,) * len(found)

    @staticmethod
    def jvp(ctx: Any, _operator: None, _needed: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _tangents(_Gradient.formula(ctx.operator, ctx.needed), ctx.saved_tensors, tangents)
