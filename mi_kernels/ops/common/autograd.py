"""What the operators' autograd functions share: which gradients are wanted, slopes, differentiable gradients.

Losses whose gradients are computed with the value keep them in the accumulation type until backward knows the slope:
a loss scale then reaches them before they are rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[..., Sequence[Tensor]]


def needs(flags: Sequence[bool], bits: Sequence[int]) -> int:
    """The bits of the inputs that need a gradient; flags beyond the bits belong to other arguments."""
    return sum(bit for bit, wanted in zip(bits, flags, strict=False) if wanted)


def times(gradients: Sequence[Tensor | None], slopes: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients times the slope of their group, in place; each slope has its gradient's leading dimensions.

    The caller must own the gradients, and no slope may be `batched`. Nothing is done where the slope is the single
    number 1, as at the root of a backward pass.
    """
    if is_one(slopes[0]):
        return list(gradients)
    return [None if t is None else t.mul_(_beside(t, g)) for t, g in zip(gradients, slopes, strict=True)]


def is_one(g: Tensor) -> bool:
    """Whether a slope is known to be the single number 1."""
    return g.numel() == 1 and readable(g) and g.item() == 1.0


def scaled(gradients: Sequence[Tensor | None], slopes: Sequence[Tensor]) -> list[Tensor | None]:
    """As `times`, out of place: for compiled graphs, and for slopes that carry a batch of vmap's."""
    return [None if t is None else t * _beside(t, g) for t, g in zip(gradients, slopes, strict=True)]


def _beside(t: Tensor, g: Tensor) -> Tensor:
    return g.to(t.dtype).reshape(*g.shape, *(1,) * (t.dim() - g.dim()))


def batched(t: Tensor) -> bool:
    """Whether t stands for a batch of tensors under vmap, `is_grads_batched` included."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_batchedtensor(t)


def readable(t: Tensor) -> bool:
    """Whether t's values may be looked at, to check them or to choose what is computed.

    Not on a GPU, which would have to be waited for; not in a compiled graph, which would break; not under vmap or
    another transform of torch.func, where t stands for other values.
    """
    if not t.is_cpu or torch.compiler.is_compiling():
        return False
    return not (torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t))


def needs_formula(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a backward must give gradients in plain torch: they will be differentiated again (`create_graph`), or the
    gradients that arrive are batches under vmap (`is_grads_batched`), which no kernel takes."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(g is not None and batched(g) for g in gradients)


def differentiable_gradients(
    formula: Formula,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of formula(*inputs) that can be differentiated again; None where they are not needed.

    The formula runs on aliases of the inputs. On the inputs themselves, a gradient would also flow from an input into
    another one that the caller computed it from, and autograd would then count that path a second time.
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
