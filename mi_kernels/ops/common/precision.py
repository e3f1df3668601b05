"""The precision of matrix products: TF32 if torch allows it, fp32 sums for 16-bit factors, and never under autocast.

The operators choose their own precision. Autocast would round the fp32 factors of their products to 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
# 16-bit products that come out in fp32 (`out_dtype`); before torch 2.8 they would be rounded to 16 bits.
WIDE_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads() and "dtype_out" in torch.ops.aten.baddbmm.overloads()


def tf32_allowed() -> bool:
    """Whether fp32 matmuls on CUDA may use TF32. Since torch 2.9 reading the old setting raises once the new one is
    set."""
    matmul = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if chosen is None else chosen == "tf32"


def autocast_on(device: str) -> bool:
    """Whether autocast is enabled for a device type. For "meta", where torch raises an error, the answer is no."""
    return device != "meta" and torch.is_autocast_enabled(device)


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: runs `function` with autocast disabled. Entering torch's context takes longer than a small matmul, so
    it is entered only if autocast is enabled."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Spelled out, because torch.compile supports `with`, but not ExitStack.
        cpu, cuda = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        if cpu and cuda:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)
        if cpu:
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        if cuda:
            with torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


# On CPUs torch.cat does not accept fp16 under autocast.
joined = outside_autocast(torch.cat)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product a b [G, ., .] in the accumulation type: for 16-bit factors, sums and result are fp32."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.is_cuda and WIDE_PRODUCTS:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b [G, ., .] with total in the accumulation type. The matmul adds, so total is read and written
    once."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    elif a.is_cuda and WIDE_PRODUCTS:
        torch.baddbmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.baddbmm_(a.to(total.dtype), b.to(total.dtype))
