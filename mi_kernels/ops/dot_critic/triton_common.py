"""Tile primitives and launch settings that the forward and backward kernels of the dot critic share.

A kernel *owns* a tile of one side (`own`, `BM` indices) and walks over the other side (`oth`, `BN` indices a
step). With `SWAP` the owner holds columns of S instead of rows; only the positive pair `j == (i + shift) % N`
and the vectors that belong to rows by definition need to know.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ALL, OFF_DIAGONAL, IDS_DIFFER, IDS_DIFFER_OR_POSITIVE = range(4)
_MAX_SIDE = 2**30


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
def positive_tile(o_own, o_oth, n_own, n_oth, shift, SWAP: tl.constexpr):
    """Whether column j is the positive of row i: [BM, BN]."""
    if SWAP:
        return o_own[:, None] == ((o_oth + shift) % n_own)[None, :]
    else:
        return ((o_own + shift) % n_oth)[:, None] == o_oth[None, :]


@triton.jit
def allowed_tile(o_own, o_oth, b_own_ids, b_oth_ids, m_pos, n_own, n_oth, PAIRS: tl.constexpr):
    """Which pairs take part: [BM, BN]. False outside of the matrix."""
    m = (o_own < n_own)[:, None] & (o_oth < n_oth)[None, :]
    if PAIRS == 1:
        m = m & (o_own[:, None] != o_oth[None, :])
    if PAIRS == 2:
        m = m & (b_own_ids[:, None] != b_oth_ids[None, :])
    if PAIRS == 3:
        m = m & ((b_own_ids[:, None] != b_oth_ids[None, :]) | m_pos)
    return m


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


class Tiling(NamedTuple):
    """Block sizes of one launch. `BO` is the width of the gradient that one program owns (unused forward)."""

    BM: int
    BN: int
    BK: int
    BO: int
    num_warps: int
    num_stages: int


def precision(dtype: torch.dtype, interpreted: bool) -> str:
    """How tile products treat their operands. The interpreter would multiply the bit patterns of bfloat16."""
    if interpreted and dtype == torch.bfloat16:
        return "upcast"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power(n: int, low: int) -> int:
    return max(low, triton.next_power_of_2(n))


def check(x: torch.Tensor, y: torch.Tensor, row_ids, col_ids, pairs: int, shift: int, interpreted: bool) -> None:
    """Raises where a launch could not run or would read out of bounds."""
    if not (interpreted or (x.is_cuda and y.is_cuda)):
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got x on {x.device} and y on {y.device}"
        )
    if x.dtype != y.dtype or x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x and y must share one of float64/32, bfloat16, float16, got {x.dtype} and {y.dtype}")
    if x.dim() != 3 or y.dim() != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"x must be [G, B, D] and y [G, N, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    if max(x.shape[1:]) > _MAX_SIDE or y.shape[1] > _MAX_SIDE:
        raise ValueError(f"B, N and D must not exceed {_MAX_SIDE}, got {tuple(x.shape)} and {tuple(y.shape)}")
    if pairs not in (ALL, OFF_DIAGONAL, IDS_DIFFER, IDS_DIFFER_OR_POSITIVE):
        raise ValueError(f"pairs must be 0, 1, 2 or 3, got {pairs}")
    if pairs >= IDS_DIFFER and (row_ids is None or col_ids is None):
        raise ValueError(f"pairs={pairs} compares ids: row_ids and col_ids must be given")
    if pairs == IDS_DIFFER_OR_POSITIVE and shift < 0:
        raise ValueError("pairs=3 keeps the positive pair: positive_shift must not be negative")


def as_vector(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def device_guard(t: torch.Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
