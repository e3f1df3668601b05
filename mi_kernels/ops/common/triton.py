"""Tile primitives and launch helpers that the Triton kernels of several operators share.

Prefixes: `p_` a pointer, `o_` offsets, `b_` a block in registers, `m_` a mask.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .precision import tf32_allowed


@triton.jit
def load_tile(p, o_n, o_k, n, D):
    """Rows `o_n` and features `o_k` of a row-major [n, D] matrix, zero outside of it: [BN, BK]."""
    mask = (o_n < n)[:, None] & (o_k < D)[None, :]
    return tl.load(p + o_n.to(tl.int64)[:, None] * D + o_k[None, :], mask=mask, other=0.0)


@triton.jit
def load_vector(p, o_n, n, other):
    return tl.load(p + o_n, mask=o_n < n, other=other)


@triton.jit
def mma(b_a, b_b, b_acc, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        b_a = b_a.to(ACC)
        b_b = b_b.to(ACC)
        return tl.dot(b_a, b_b, b_acc, input_precision="ieee", out_dtype=ACC)
    else:
        return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def dot_tile(p_own, p_oth, o_own, o_oth, n_own, n_oth, D, ACC: tl.constexpr, PRECISION: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """<own, oth> for one tile, the features taken BK at a time: [BM, BN]."""
    b_dot = tl.zeros([BM, BN], dtype=ACC)
    for i_k in range(0, D, BK):
        o_k = i_k + tl.arange(0, BK)
        b_own = load_tile(p_own, o_own, o_k, n_own, D)  # [BM, BK]
        b_oth = load_tile(p_oth, o_oth, o_k, n_oth, D)  # [BN, BK]
        b_dot = mma(b_own, tl.trans(b_oth), b_dot, ACC, PRECISION)
    return b_dot


@triton.jit
def tile_lse_parts(b_s, AXIS: tl.constexpr):
    """Two summands of the log-sum-exp along an axis: the largest score and what the others add to it. Over excluded
    scores (-inf) alone their sum is -inf."""
    b_max = tl.max(b_s, AXIS)
    b_ref = tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max)  # inf - inf would be NaN
    return b_ref, tl.log(tl.sum(tl.exp(b_s - tl.expand_dims(b_ref, AXIS)), AXIS))


@triton.jit
def tile_lse(b_s, AXIS: tl.constexpr):
    b_ref, b_log = tile_lse_parts(b_s, AXIS)
    return b_ref + b_log


@triton.jit
def log1p_unit(t, TERMS: tl.constexpr):
    """log(1 + t) for t in [0, 1] as 2 artanh(t / (2 + t)), accurate also where 1 + t rounds t away."""
    r = t / (2.0 + t)
    z = r * r
    poly = tl.zeros_like(t) + 1.0 / (2 * TERMS - 1)
    for k in tl.static_range(TERMS - 2, -1, -1):
        poly = poly * z + 1.0 / (2 * k + 1)
    return 2.0 * r * poly


@triton.jit
def softplus(s, TERMS: tl.constexpr):
    return tl.maximum(s, 0.0) + log1p_unit(tl.exp(-tl.abs(s)), TERMS)


@triton.jit
def sigmoid(s):
    t = tl.exp(-tl.abs(s))
    return tl.where(s >= 0, 1.0, t) / (1.0 + t)


def precision(dtype: torch.dtype, interpreted: bool) -> str:
    """How tile products treat their operands. The interpreter would multiply the bit patterns of bfloat16."""
    if interpreted and dtype == torch.bfloat16:
        return "upcast"
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def next_power(n: int, low: int) -> int:
    return max(low, triton.next_power_of_2(n))


def as_vector(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def device_guard(t: torch.Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether tiles for Hopper fit: from there on operands of products stay in shared memory, and registers suffice for
    larger tiles. True for tensors that are on no GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
