"""What the interpreter cases of several operators share: poisoned outputs, products of TF32 parts, errors, comparison
with plain torch.

A module of cases runs in a process of its own: TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter

# The interpreter's, or that of a GPU on which the same cases run compiled.
DEVICE = torch.device(os.environ.get("MI_KERNELS_TEST_DEVICE", "cpu"))


def prepare() -> None:
    """Every uninitialised floating-point tensor holds NaN from here on; the interpreter's warnings are silenced. Its
    products of three TF32 parts round as a GPU's do: by itself it would multiply in fp32."""
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
    torch.empty, torch.empty_like = _poisoned(torch.empty), _poisoned(torch.empty_like)
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _three_products(builder.create_dot)


def _tf32(a: np.ndarray, half: int) -> np.ndarray:
    """fp32 cut off to TF32's 10 bits of fraction, after adding `half` to the bits."""
    return ((a.view(np.uint32) + np.uint32(half)) & np.uint32(0xFFFFE000)).view(np.float32)


def _three_products(plain):
    def create_dot(self, a, b, d, input_precision, *rest):
        if input_precision != ir.INPUT_PRECISION.TF32x3:
            return plain(self, a, b, d, input_precision, *rest)
        high = [_tf32(t.data, 0x1000) for t in (a, b)]  # rounded to nearest
        low = [_tf32(t.data - h, 0) for t, h in zip((a, b), high, strict=True)]
        with np.errstate(over="ignore", invalid="ignore"):  # of rows that are too far apart for products
            found = low[0] @ high[1] + high[0] @ low[1] + high[0] @ high[1]
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    return create_dot


def under_autocast(on: bool):
    """What a caller's autocast must not change: operators choose their own precision."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if on else nullcontext()


def _poisoned(empty):
    def fill(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    return fill


def error(got: Tensor, want: Tensor) -> float:
    """Norm-wise, relative to `want` (absolute where that is zero); infinite where shapes differ or a NaN shows."""
    got, want = got.double().cpu(), want.double().cpu()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    norm = want.norm().item()
    return (got - want).norm().item() / (norm if norm > 0 else 1.0)


def worse(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> list[str]:
    """A complaint where `got` errs more than twice as much as plain torch in that precision, and one in a million."""
    ours, theirs = error(got, exact), error(plain, exact)
    if ours <= 2 * min(theirs, 1.0) + 1e-6:
        return []
    return [f"{name}: error {ours:.2e}, plain torch {theirs:.2e}"]
