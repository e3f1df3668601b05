"""torch's flash attention, for GPU calls that it supports and that name no backend.

It supports softmax in 16 bits without lengths and dropout, over all keys or causal with as many keys as queries. Its
outputs and row_lse equal those of the other kernels, so forward and backward may use different kernels. It is tuned for
every architecture and expected to be faster on long sequences with wide heads. It needs one launch per pair, so pairs
shorter than FROM stay in the grouped kernels. The backward pass uses flash attention's deterministic mode. Costs are
those of `triton_forward` and `triton_backward` plus a copy of each result, because flash attention returns the layout
[B, T, heads, E].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FROM = 512  # least number of queries and keys; below it launches dominate. An estimate, not measured yet
_NARROWEST = 32  # least number of features; flash attention pads narrower heads


def _is_causal(query: Tensor, key: Tensor, offset: int) -> bool | None:
    """True for the usual causal mask, False for no mask, None for any other mask."""
    if offset >= key.shape[2] - 1:
        return False
    return True if offset == 0 and query.shape[2] == key.shape[2] else None


def _suits(q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor, key_lengths: Tensor, offset: int, p: float) -> bool:
    causal = _is_causal(q, k, offset)
    return (
        causal is not None
        and p == 0.0
        and query_lengths.numel() == key_lengths.numel() == 0
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3] >= _NARROWEST
        and q.shape[3] % 8 == 0
        and min(q.shape[2], k.shape[2]) >= FROM
        and all(t.stride(3) == 1 for t in (q, k, v))
        and q.is_cuda
        and torch.backends.cuda.can_use_flash_attention(
            torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, False)
        )
    )


def suits(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    query_lengths: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    causal_offset: Sequence[int],
    scale: Sequence[float],
    dropout_p: Sequence[float],
    *,
    sparse: bool,
) -> bool:
    """Whether flash attention supports every pair of the call."""
    pairs = zip(query, key, value, query_lengths, key_lengths, causal_offset, dropout_p, strict=True)
    return not sparse and all(_suits(*pair) for pair in pairs)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Enables torch's deterministic mode, without which the backward of flash attention uses atomics."""
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only, fill = torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic
    filled = fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False, warn_only=warn_only)
        fill.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float) -> Any:
    # Without dropout the state of the random generator is not read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        g, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, *state, scale=scale
    )


def forward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    query_lengths: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    causal_offset: Sequence[int],
    scale: Sequence[float],
    *rest: Any,
) -> list[Tensor]:
    """The operator of schema.py, for pairs that suit."""
    found = [
        _forward(q, k, v, bool(_is_causal(q, k, offset)), factor)
        for q, k, v, offset, factor in zip(query, key, value, causal_offset, scale, strict=True)
    ]
    return [out.contiguous() for out, _ in found] + [lse.contiguous() for _, lse in found]


def backward(
    grad_out: Sequence[Tensor],
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    out: Sequence[Tensor],
    stat: Sequence[Tensor],
    query_lengths: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    causal_offset: Sequence[int],
    scale: Sequence[float],
    *rest: Any,
) -> list[Tensor]:
    """The operator of schema.py, for pairs that suit."""
    grads = [g if g.stride(3) == 1 else g.contiguous() for g in grad_out]
    pairs = zip(grads, query, key, value, out, stat, causal_offset, scale, strict=True)
    with _deterministic():
        found = [
            _backward(g, q, k, v, o, lse, bool(_is_causal(q, k, offset)), factor)
            for g, q, k, v, o, lse, offset, factor in pairs
        ]
    return [gradients[side].contiguous() for side in range(3) for gradients in found]
