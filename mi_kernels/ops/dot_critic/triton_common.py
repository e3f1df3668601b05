"""Tile primitives and launch settings that the forward and backward kernels of the dot critic share.

A kernel *owns* a tile of one side (`own`, `BM` indices) and walks over the other side (`oth`, `BN` indices a
step). With `SWAP` the owner holds columns of S instead of rows; only the positive pair `j == (i + shift) % N`
and the vectors that belong to rows by definition need to know.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.triton import dot_tile, load_vector
from .schema import ALL, OFF_DIAGONAL, UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE

_MAX_SIDE = 2**30
CHUNK_BYTES = 256 * 2**20
LEAST_ROWS = 2048  # every chunk reads and writes dy: with fewer rows that traffic, not the matmuls, would set the time
MOST_COLUMNS = 2**24  # offsets within a tile of rows have 32 bits
GROUP = 8  # row tiles of a launch over tiles that share columns
SMALLEST = tl.constexpr(2.0**-100)  # sums of exponentials from here on have the precision of their largest terms


def rows_of_chunk(G: int, N: int, element: int) -> int:
    """Rows whose dS [G, rows, N] fits CHUNK_BYTES, LEAST_ROWS at least."""
    return max(LEAST_ROWS, CHUNK_BYTES // (G * N * element))


@triton.jit
def clamp(b_s, CLIP: tl.constexpr):
    """To [-CLIP, CLIP]; -inf, which takes no part, and NaN stay."""
    b_s = tl.where(b_s > CLIP, CLIP, b_s)
    return tl.where((b_s < -CLIP) & (b_s > -float("inf")), -CLIP, b_s)


@triton.jit
def place(n_chunk, n_col, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Group, row tile and column tile of a program: GROUP row tiles share the columns that are in cache."""
    n_rows, n_cols = tl.cdiv(n_chunk, BM), tl.cdiv(n_col, BN)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_rows * n_cols)
    i = pid % (n_rows * n_cols)
    first = i // (GROUP * n_cols) * GROUP
    height = tl.minimum(n_rows - first, GROUP)
    i = i % (GROUP * n_cols)
    return i_g, first + i % height, i // height


@triton.jit
def score_tile(
    p_x, p_y, p_scale, p_row_bias, p_col_bias, i_g, o_row, o_col, n_row, n_end, n_col, D,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S [BM, BN] of the rows o_row, below n_end, and the columns o_col of group i_g; a bias may be None."""
    x, y = p_x + i_g * n_row * D, p_y + i_g * n_col * D
    b_s = dot_tile(x, y, o_row, o_col, n_end, n_col, D, ACC, PRECISION, BM, BN, BK)
    b_s *= tl.load(p_scale + i_g)
    if p_row_bias is not None:
        b_s += load_vector(p_row_bias + i_g * n_row, o_row, n_end, 0.0)[:, None]
    if p_col_bias is not None:
        b_s += load_vector(p_col_bias + i_g * n_col, o_col, n_col, 0.0)[None, :]
    return b_s


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


class Tiling(NamedTuple):
    """Block sizes of one launch. `BO` is the width of the gradient that one program owns (unused forward)."""

    BM: int
    BN: int
    BK: int
    BO: int
    num_warps: int
    num_stages: int


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
    if pairs not in (ALL, OFF_DIAGONAL, UNEQUAL_IDS, UNEQUAL_IDS_OR_POSITIVE):
        raise ValueError(f"pairs must be 0, 1, 2 or 3, got {pairs}")
    if pairs >= UNEQUAL_IDS and (row_ids is None or col_ids is None):
        raise ValueError(f"pairs={pairs} compares ids: row_ids and col_ids must be given")
    if pairs == UNEQUAL_IDS_OR_POSITIVE and shift < 0:
        raise ValueError("pairs=3 keeps the positive pair: positive_shift must not be negative")
