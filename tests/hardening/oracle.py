"""Compares a call on the default backend with the fp64 reference, and derives how much error is allowed.

An output or gradient may differ from the fp64 result `want`, in norm, by at most

    2 e + 16 d + 16 v g + w |want| + 16 f + 4 u t

| term | meaning |
|---|---|
| e | error of the plain-torch reference in the dtype of the inputs; in 16 bits the largest of four, see below |
| d | change of the exact result when every input changes by a random unit roundoff of its dtype |
| v | unit roundoff of the accumulation type |
| g | norm of the largest gradient of the call; for an output the sum of abs(input * gradient) |
| w | 4 unit roundoffs of the dtype of the result, at least 1e-6 for 16- and 32-bit inputs; in fp64 `_roundings` |
| f | given by the call if the terms of its sums are larger than d and g suggest; otherwise 0 |
| u | unit roundoff of the dtype of the input |
| t | for a gradient whose pairs are rounded to the inputs' dtype: the sum of the absolute terms; otherwise 0 |

In fp64, e is 0, because the reference is compared with itself. d and g are large if a sum cancels, so that an
ill-conditioned result is allowed a larger error than a well-conditioned one. Example of f: a squared MMD of 1e-19 is a
sum of kernel values of size 1, which fp64 rounds by 1e-16. t is needed because plain torch may round two terms that
cancel in the same way; then e is 0 although the terms were rounded. For the same reason a single e says little if
layers round their activations to 16 bits and most of a sum cancels: it can be near 0 by chance. A 16-bit result above
the allowance is therefore compared with the largest e of four problems: the call, and three whose inputs differ from it
by a random rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mi_kernels as mk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("plain", "transposed", "sliced", "gapped", "reversed storage")
EXPANDED = "expanded"  # changes values: all entries along the first dimension are equal
Function = Callable[..., Tensor | Sequence[Tensor]]


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if t.dim() < 2 or kind == "plain":
        return t.contiguous()
    if kind == "transposed":
        return t.mT.contiguous().mT
    if kind == "sliced":
        return torch.cat([t.new_full((*t.shape[:-1], 3), torch.nan), t, t.new_full((*t.shape[:-1], 2), torch.nan)], -1)[
            ..., 3:-2
        ]
    if kind == "gapped":
        return torch.stack([t, torch.full_like(t, torch.nan)], -2).flatten(-3, -2)[..., ::2, :]
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


@dataclass(frozen=True)
class Difference:
    """The error of one output or gradient, and the allowed error."""

    name: str
    error: float
    allowed: float

    @property
    def excess(self) -> float:
        return self.error / self.allowed if self.error else 0.0


def _results(function: Function, tensors: Sequence[Tensor], slopes: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of sum(output * slope). The slopes are drawn in the first call and then reused."""
    leaves = [t.detach().requires_grad_() for t in tensors]  # keeps strides
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    if not slopes:
        slopes += [torch.randn(out.shape, dtype=torch.float64) for out in outputs]
    total = torch.stack([(out.double() * s).sum() for out, s in zip(outputs, slopes, strict=True)]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*(out.detach() for out in outputs),
            *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True))]  # fmt: skip


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _roundings(tensors: Sequence[Tensor]) -> float:
    """By how many unit roundoffs two fp64 results may differ, relative to terms that do not cancel.

    At most n = 8 + 3 L roundings lie between an input and a result, where L is the longest dimension: a product, a sum
    over features, the scale, a difference, exp, a sum over candidates, log, a difference, a sum over the batch (for a
    gradient: over candidates) and a factor. A sum of L terms in any order rounds a term at most L - 1 times. So a term
    is multiplied by n factors 1 + d with |d| <= u. If the d have mean 0, their product differs from 1 by at most
    r sqrt(n) u, except with probability 2 exp(-r^2 / 2) (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), theorem 2.4);
    the worst case is n u. Both results make n roundings: r sqrt(2 n) u. With r = 6 the probability is 3e-8 for each
    result. With large scores, exp amplifies their rounding errors; that is part of d in the module docstring.
    """
    longest = max(max(t.shape, default=1) for t in tensors)
    return 6 * math.sqrt(2 * (8 + 3 * longest))


def differences(
    function: Function,
    tensors: Sequence[Tensor],
    floor: float = 0.0,
    terms_of_gradients: Callable[[], list[float]] | None = None,
) -> list[Difference]:
    """Errors of all outputs and gradients of function(*tensors), which returns one or several tensors.

    floor: f of the module docstring. terms_of_gradients: returns t of every gradient for a slope of 1; it is called
    only if a result exceeds the allowance without t."""
    slopes: list[Tensor] = []
    with mk.use_backend("reference"):
        wide = [t.detach().double() for t in tensors]
        want = _results(function, wide, slopes)
        plain = _results(function, tensors, slopes)
        moved = [torch.zeros((), dtype=torch.float64) for _ in want]
        for seed in (3, 4):
            other = _results(function, _near(wide, tensors, 1.0, seed), slopes)
            moved = [torch.maximum(m, (o - w).norm()) for m, o, w in zip(moved, other, want, strict=True)]
    found = _results(function, tensors, slopes)
    gradients = want[len(slopes) :]
    largest = max(float(g.norm()) for g in gradients)
    if len(slopes) == 1 and slopes[0].numel() == 1:  # one number may barely move in both draws: use its deviation
        parts = [unit(t.dtype) * (g * w).norm() for g, w, t in zip(gradients, wide, tensors, strict=True)]
        moved[0] = torch.maximum(moved[0], torch.stack(parts).norm() / 3**0.5 / slopes[0].abs().max())
    terms = sum(float((g * w).abs().sum()) for g, w in zip(gradients, wide, strict=True))
    sums = unit(torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
    report = []
    errors = [float((p.double() - w).norm()) for p, w in zip(plain, want, strict=True)]
    for k, (f, w, m) in enumerate(zip(found, want, moved, strict=True)):
        if f.shape != w.shape:
            raise AssertionError(f"result {k} has shape {tuple(f.shape)}, the reference {tuple(w.shape)}")
        limits = torch.finfo(f.dtype)
        in_fp64 = tensors[0].dtype == torch.float64
        share = max(4 * unit(f.dtype), _roundings(tensors) * sums if in_fp64 else 1e-6)
        allowed = 2 * errors[k] + 16 * m + share * w.norm()
        allowed += 16 * sums * (largest if k >= len(slopes) else terms) + 16 * floor
        allowed += limits.smallest_normal * max(w.numel(), 1)  # below this, a dtype has no relative precision
        error = float((f.double() - w.clamp(limits.min, limits.max)).norm())
        name = f"output {k}" if k < len(slopes) else f"gradient {k - len(slopes)}"
        report.append(Difference(name, error if error == error else float("inf"), float(allowed)))
    if terms_of_gradients is not None and any(not d.excess <= 1 for d in report):
        slope, outputs = max(float(s.abs().max()) for s in slopes), report[: len(slopes)]
        report = outputs + [
            Difference(d.name, d.error, d.allowed + 4 * unit(t.dtype) * slope * size)
            for d, t, size in zip(report[len(slopes) :], tensors, terms_of_gradients(), strict=True)
        ]
    if tensors[0].dtype.itemsize == 2 and any(not d.excess <= 1 for d in report):
        more = [_error_nearby(function, wide, tensors, slopes, seed) for seed in range(3)]
        report = [
            Difference(d.name, d.error, d.allowed + 2 * (max(e, *others) - e))
            for d, e, *others in zip(report, errors, *more, strict=True)
        ]
    return report


def _near(wide: Sequence[Tensor], tensors: Sequence[Tensor], units: float, seed: int) -> list[Tensor]:
    """The fp64 inputs, with each number changed by at most ``units`` unit roundoffs of its dtype."""
    generator = torch.Generator().manual_seed(seed)  # not the global one, which the function may seed
    draw = lambda w: 2 * torch.rand(w.shape, generator=generator, dtype=w.dtype) - 1  # noqa: E731
    return [w * (1 + units * unit(t.dtype) * draw(w)) for w, t in zip(wide, tensors, strict=True)]


def _error_nearby(
    function: Function, wide: Sequence[Tensor], tensors: Sequence[Tensor], slopes: list[Tensor], seed: int
) -> list[float]:
    """e of every result for inputs that are changed at random by at most one unit in the last place."""
    near = [w.to(t.dtype) for w, t in zip(_near(wide, tensors, 2.0, seed), tensors, strict=True)]
    with mk.use_backend("reference"):
        want = _results(function, [t.double() for t in near], slopes)
        plain = _results(function, near, slopes)
    return [float((p.double() - w).norm()) for p, w in zip(plain, want, strict=True)]


def check(
    function: Function,
    tensors: Sequence[Tensor],
    floor: float = 0.0,
    terms_of_gradients: Callable[[], list[float]] | None = None,
) -> None:
    wrong = [d for d in differences(function, tensors, floor, terms_of_gradients) if not d.excess <= 1]
    assert not wrong, "; ".join(f"{d.name}: error {d.error:.3g}, allowed {d.allowed:.3g}" for d in wrong)
