"""Shared by the autograd functions of the operators: the `needs` mask, scaling by incoming gradients, double backward.

A "slope" is the gradient that arrives at an output in backward. Losses that compute gradients together with the value
keep them in the accumulation type until the slope is known. A loss scale is then applied before they are rounded to 16
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[..., Sequence[Tensor]]


def needs(flags: Sequence[bool], bits: Sequence[int]) -> int:
    """The bit mask of the inputs that need a gradient; flags beyond the bits belong to other arguments."""
    return sum(bit for bit, wanted in zip(bits, flags[: len(bits)], strict=True) if wanted)


def times(gradients: Sequence[Tensor | None], slopes: Sequence[Tensor]) -> list[Tensor | None]:
    """Multiplies gradients in place by the slope of their group; a slope has the leading dimensions of its gradient.

    The caller must own the gradients, and no slope may be `batched`. A slope that is the single number 1, as at the
    root of a backward pass, is skipped.
    """
    if is_one(slopes[0]):
        return list(gradients)
    return [None if t is None else t.mul_(_beside(t, g)) for t, g in zip(gradients, slopes, strict=True)]


def is_one(g: Tensor) -> bool:
    """Whether a slope is certainly the single number 1."""
    return g.numel() == 1 and readable(g) and g.item() == 1.0


def scaled(gradients: Sequence[Tensor | None], slopes: Sequence[Tensor]) -> list[Tensor | None]:
    """Like `times`, but out of place: for compiled graphs and for batched slopes under vmap."""
    return [None if t is None else t * _beside(t, g) for t, g in zip(gradients, slopes, strict=True)]


def _beside(t: Tensor, g: Tensor) -> Tensor:
    return g.to(t.dtype).reshape(*g.shape, *(1,) * (t.dim() - g.dim()))


def batched(t: Tensor) -> bool:
    """Whether t represents a batch of tensors under vmap, including `is_grads_batched`."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_batchedtensor(t)


def readable(t: Tensor) -> bool:
    """Whether the values of t may be read, to check them or to choose an algorithm.

    They may not be read on a GPU (which would synchronise), in a compiled graph (which would break), or under vmap and
    other torch.func transforms (where t represents other values).
    """
    if not t.is_cpu or torch.compiler.is_compiling():
        return False
    return not (torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t))


def needs_formula(gradients: Sequence[Tensor | None]) -> bool:
    """Whether backward must compute gradients in plain torch: because they will be differentiated again
    (`create_graph`), or because the incoming gradients are batched under vmap (`is_grads_batched`), which kernels do
    not support."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(g is not None and batched(g) for g in gradients)


def differentiable_gradients(
    formula: Formula,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of formula(*inputs) that can be differentiated again; None for inputs that need none.

    The formula runs on aliases of the inputs. If the caller computed one input from another, running it on the inputs
    themselves would also propagate gradients along that path, and autograd would count the path twice.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        targets = [a for a, need in zip(aliases, needed, strict=True) if need and a is not None]
        outputs = formula(*aliases)
    used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not used or not targets:
        return (None,) * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used], targets, [g for _, g in used], create_graph=again, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needed)
