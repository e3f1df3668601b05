"""Shared by the operators' triton_cases.py: poisoned outputs, products of TF32 parts, errors, comparison with plain
torch.

A module of cases runs in its own process, because triton reads TRITON_INTERPRET when it is imported.
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

# The interpreter's device, or a GPU on which the same cases run compiled.
DEVICE = torch.device(os.environ.get("MI_KERNELS_TEST_DEVICE", "cpu"))


def prepare() -> None:
    """Prepares the process: uninitialised floating-point tensors are filled with NaN, the interpreter's warnings are
    silenced, and its 3xTF32 products round as on a GPU (by default the interpreter multiplies in fp32)."""
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
    torch.empty, torch.empty_like = _poisoned(torch.empty), _poisoned(torch.empty_like)
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _three_products(builder.create_dot)


def _tf32(a: np.ndarray, half: int) -> np.ndarray:
    """Adds `half` to the bits of fp32 numbers, then truncates them to TF32's 10 bits of fraction."""
    return ((a.view(np.uint32) + np.uint32(half)) & np.uint32(0xFFFFE000)).view(np.float32)


def _three_products(plain):
    def create_dot(self, a, b, d, input_precision, *rest):
        if input_precision != ir.INPUT_PRECISION.TF32x3:
            return plain(self, a, b, d, input_precision, *rest)
        high = [_tf32(t.data, 0x1000) for t in (a, b)]  # rounded to nearest
        low = [_tf32(t.data - h, 0) for t, h in zip((a, b), high, strict=True)]
        with np.errstate(over="ignore", invalid="ignore"):  # rows that are too far apart for products
            found = low[0] @ high[1] + high[0] @ low[1] + high[0] @ high[1]
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    return create_dot


def under_autocast(on: bool):
    """The context of a caller's autocast, which must not change results, because operators choose their precision."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if on else nullcontext()


def _poisoned(empty):
    def fill(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    return fill


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the error relative to `want` (absolute if `want` is 0); infinite if shapes differ or `got` is not
    finite."""
    got, want = got.double().cpu(), want.double().cpu()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    norm = want.norm().item()
    return (got - want).norm().item() / (norm if norm > 0 else 1.0)


def worse(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> list[str]:
    """A complaint if the error of `got` is more than twice that of plain torch in the same precision, plus 1e-6."""
    ours, theirs = error(got, exact), error(plain, exact)
    if ours <= 2 * min(theirs, 1.0) + 1e-6:
        return []
    return [f"{name}: error {ours:.2e}, plain torch {theirs:.2e}"]
