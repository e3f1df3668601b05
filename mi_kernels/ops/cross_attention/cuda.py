"""Attention on the CUDA C++ kernels of csrc/cross_attention/ (sm_80 and up), for heads of up to 16 features.

One launch forward and two backward for every up to 16 pairs whose head sizes are alike. A lane owns a query (or a key)
and multiplies in fp32 whatever the inputs' type: with so few features tensor cores would mostly multiply padding.
2 B heads Tq Tk (E + Ev) FLOPs forward for softmax (sparsemax: 2 B heads Tq Tk E more for each of its passes, four or
so), 2 B heads Tq Tk (4 E + 3 Ev) backward, features padded to a multiple of four. Nothing but outputs and one number
per query is stored, every output once by its owner, no value goes to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .schema import MOST_FEATURES

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(query: Sequence[Tensor], value: Sequence[Tensor]) -> bool:
    """Whether there is a kernel for these types and head sizes."""
    widest = max(t.shape[3] for t in (*query, *value))
    return widest <= MOST_FEATURES and all(q.dtype in TYPES for q in query)


def _check(query: Sequence[Tensor], value: Sequence[Tensor]) -> None:
    if not fits(query, value):
        widest = max(t.shape[3] for t in (*query, *value))
        raise RuntimeError(
            "backend 'cuda' was requested but cannot run cross_attention: its kernels take float32, bfloat16 and "
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
