"""Attention on the CUDA C++ kernels of csrc/cross_attention/ (sm_80 and higher), for heads of up to 16 features.

Up to 16 pairs with equal head sizes share one forward launch and two backward launches. A lane owns a query (or a key)
and multiplies in fp32 for all input types, because with so few features tensor cores would mostly multiply padding.
Cost: 2 B heads Tq Tk (E + Ev) FLOP forward for softmax (for sparsemax 2 B heads Tq Tk E more for each of about four
passes), 2 B heads Tq Tk (4 E + 3 Ev) backward, with features padded to a multiple of four. Only the outputs and one
number per query are stored. Each output is written once by its owner, and no value is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .schema import MOST_FEATURES

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(query: Sequence[Tensor], value: Sequence[Tensor]) -> bool:
    """Whether there is a kernel for these dtypes and head sizes."""
    widest = max(t.shape[3] for t in (*query, *value))
    return widest <= MOST_FEATURES and all(q.dtype in TYPES for q in query)


def _check(query: Sequence[Tensor], value: Sequence[Tensor]) -> None:
    if not fits(query, value):
        widest = max(t.shape[3] for t in (*query, *value))
        raise RuntimeError(
            "backend 'cuda' was requested but cannot run cross_attention: its kernels support float32, bfloat16 and "
            f"float16 and heads of up to {MOST_FEATURES} features, got {query[0].dtype} and {widest}"
        )


def forward(query: Sequence[Tensor], key: Sequence[Tensor], value: Sequence[Tensor], *rule: Any) -> list[Tensor]:
    """The operator of schema.py."""
    _check(query, value)
    return torch.ops.mi_kernels_cuda.cross_attention_forward(query, key, value, *rule)


def backward(
    grad_out: Sequence[Tensor], query: Sequence[Tensor], key: Sequence[Tensor], value: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """The operator of schema.py."""
    _check(query, value)
    return torch.ops.mi_kernels_cuda.cross_attention_backward(grad_out, query, key, value, *rest)
