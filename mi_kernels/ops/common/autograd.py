"""Which gradients an operator is asked for, and those computed with a loss's value on their way out in backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def needs(flags: Sequence[bool], bits: Sequence[int]) -> int:
    """The bits of the inputs that need a gradient; flags beyond the bits are of other arguments."""
    return sum(bit for bit, wanted in zip(bits, flags, strict=False) if wanted)


def times(gradients: Sequence[Tensor | None], g: Tensor) -> Sequence[Tensor | None]:
    """Gradients [*, ...] of losses [*] times g [*], in place, and not at all where g is the one number 1, as at the
    root of backward. They must be the caller's alone."""
    if g.numel() == 1 and g.device.type == "cpu" and g.item() == 1.0:  # a GPU would have to be waited for
        return gradients
    for t in gradients:
        if t is not None:
            t.mul_(_beside(t, g))
    return gradients


def scaled(gradients: Sequence[Tensor | None], g: Tensor) -> list[Tensor | None]:
    """The same out of place, for graphs that are compiled."""
    return [None if t is None else (t * _beside(t, g)).to(t.dtype) for t in gradients]


def _beside(t: Tensor, g: Tensor) -> Tensor:
    return g.reshape(*g.shape, *(1,) * (t.dim() - g.dim()))
