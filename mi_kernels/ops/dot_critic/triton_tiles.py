"""Row and column log-sum-exps of the dot critic's scores in one pass over tiles, in Triton.

A program computes one tile of scores S, and from one exponential per pair the sums of both directions:

    e_ij = exp(S_ij - m),   m the largest score of the tile,   row_i = m + log sum_j e_ij,   col_j = m + log sum_i e_ij

A tile in which a row or a column lies so far below m that its sum underflows takes the exponentials about each row's
and each column's own maximum instead: the tile of a positive pair at a low temperature, for instance. `join_kernel`
then joins the tiles' log-sum-exps, in the order of the tiles.

N = 2 G B N D FLOPs, where a launch a side takes 2N. Rows go in chunks as in triton_backward.py: besides the outputs,
8 chunk N (1 / BM + 1 / BN) bytes are written and read once. Deterministic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..common.dtypes import lse_dtype
from ..common.triton import load_vector, precision, tile_lse_parts
from .triton_common import (
    GROUP,
    SMALLEST,
    Tiling,
    allowed_tile,
    clamp,
    place,
    positive_tile,
    rows_of_chunk,
    score_tile,
)


@triton.jit
def both_lse(b_s, m_row, m_col):
    """Log-sum-exps of a tile's rows [BM] and columns [BN] in fp64; m_row and m_col say which are inside."""
    # NaN stays in its own row and column.
    b_top = tl.max(tl.max(tl.where(b_s == b_s, b_s, -float("inf")), 1), 0)
    b_ref = tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)
    b_e = tl.exp(b_s - b_ref)
    b_row = tl.sum(b_e, 1)
    b_col = tl.sum(b_e, 0)
    least = tl.minimum(tl.min(tl.where(m_row, b_row, 1.0), 0), tl.min(tl.where(m_col, b_col, 1.0), 0))
    if (least < SMALLEST) | (b_top == float("inf")):
        b_row_ref, b_row = tile_lse_parts(b_s, 1)
        b_col_ref, b_col = tile_lse_parts(b_s, 0)
    else:
        b_row_ref, b_row = tl.zeros_like(b_row) + b_ref, tl.log(b_row)
        b_col_ref, b_col = tl.zeros_like(b_col) + b_ref, tl.log(b_col)
    return b_row_ref.to(tl.float64) + b_row.to(tl.float64), b_col_ref.to(tl.float64) + b_col.to(tl.float64)


@triton.jit(do_not_specialize=["n_row", "n_col", "first", "n_chunk", "shift"])
def both_sides_kernel(
    p_x, p_y, p_scale, p_row_bias, p_col_bias, p_row_ids, p_col_ids, p_row_part, p_col_part,
    n_row, n_col, D, first, n_chunk, shift,
    PAIRS: tl.constexpr, CLIP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n_chunk: log-sum-exps by tile, p_row_part [G, column tiles, n_chunk], p_col_part [G, row
    tiles, N]."""
    ACC: tl.constexpr = p_scale.dtype.element_ty
    i_g, i_row, i_col = place(n_chunk, n_col, BM, BN, GROUP)
    o_chunk = (i_row * BM).to(tl.int32) + tl.arange(0, BM)
    o_col = (i_col * BN).to(tl.int32) + tl.arange(0, BN)
    o_row, n_end = first + o_chunk, first + n_chunk
    b_s = score_tile(p_x, p_y, p_scale, p_row_bias, p_col_bias, i_g, o_row, o_col, n_row, n_end, n_col, D,
                     ACC, PRECISION, BM, BN, BK)  # fmt: skip
    b_row_ids, b_col_ids, m_pos = None, None, None
    if PAIRS >= 2:
        b_row_ids = load_vector(p_row_ids + i_g * n_row, o_row, n_end, 0)  # [BM]
        b_col_ids = load_vector(p_col_ids + i_g * n_col, o_col, n_col, 0)  # [BN]
    if PAIRS == 3:
        m_pos = positive_tile(o_row, o_col, n_row, n_col, shift, False)
    m = allowed_tile(o_row, o_col, b_row_ids, b_col_ids, m_pos, n_end, n_col, PAIRS)
    if CLIP is not None:
        b_s = clamp(b_s, CLIP)
    b_row, b_col = both_lse(tl.where(m, b_s, -float("inf")), o_row < n_end, o_col < n_col)
    n_rows, n_cols = tl.cdiv(n_chunk, BM), tl.cdiv(n_col, BN)
    tl.store(p_row_part + (i_g * n_cols + i_col) * n_chunk + o_chunk, b_row, mask=o_chunk < n_chunk)
    tl.store(p_col_part + (i_g * n_rows + i_row) * n_col + o_col, b_col, mask=o_col < n_col)


@triton.jit
def joined(p_part, n_parts, n, o_n, b_max, ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """The log-sum-exp over n_parts parts [n_parts, n] and of what b_max [BN] holds, at o_n. Log-sum-exps are fp64,
    their exponentials about the largest are in ACC."""
    b_sum = tl.where(b_max == -float("inf"), 0.0, tl.zeros_like(b_max) + 1.0).to(ACC)
    for i in range(0, n_parts, BP):
        o_p = i + tl.arange(0, BP)
        m = (o_p < n_parts)[:, None] & (o_n < n)[None, :]
        b_part = tl.load(p_part + o_p.to(tl.int64)[:, None] * n + o_n[None, :], mask=m, other=-float("inf"))  # [BP, BN]
        b_new = tl.maximum(b_max, tl.max(b_part, 0))
        b_ref = tl.where(tl.abs(b_new) == float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp((b_max - b_ref).to(ACC)) + tl.sum(tl.exp((b_part - b_ref[None, :]).to(ACC)), 0)
        b_max = b_new
    return tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max) + tl.log(b_sum).to(tl.float64)


@triton.jit(do_not_specialize=["n_row", "n_col", "first", "n_chunk", "row_parts", "col_parts", "row_tiles"])
def join_kernel(
    p_row_part, p_col_part, p_row, p_col,
    n_row, n_col, first, n_chunk, row_parts, col_parts, row_tiles,
    ACC: tl.constexpr, ADD: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes rows first .. first + n_chunk of p_row [G, B], and p_col [G, N], with ADD joined to what is there."""
    n_tiles = row_tiles + tl.cdiv(n_col, BN)
    i_g = tl.program_id(0).to(tl.int64) // n_tiles
    i = tl.program_id(0) % n_tiles
    b_none = tl.full([BN], -float("inf"), dtype=tl.float64)
    if i < row_tiles:
        o_n = i * BN + tl.arange(0, BN)
        b = joined(p_row_part + i_g * row_parts * n_chunk, row_parts, n_chunk, o_n, b_none, ACC, BP, BN)
        tl.store(p_row + i_g * n_row + first + o_n, b, mask=o_n < n_chunk)
    else:
        o_n = (i - row_tiles) * BN + tl.arange(0, BN)
        if ADD:
            b_none = tl.load(p_col + i_g * n_col + o_n, mask=o_n < n_col, other=-float("inf"))
        b = joined(p_col_part + i_g * col_parts * n_col, col_parts, n_col, o_n, b_none, ACC, BP, BN)
        tl.store(p_col + i_g * n_col + o_n, b, mask=o_n < n_col)


INTERPRETED = not isinstance(both_sides_kernel, triton.runtime.JITFunction)


def tiling(dtype: torch.dtype, D: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and feature size, all free of register spills on sm_80 and sm_90."""
    if interpreted:
        return Tiling(32, 16, 16, 0, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, 0, 4, 1)
    if dtype == torch.float32:
        return Tiling(64, 64, 32, 0, 8, 2) if tf32 else Tiling(64, 64, 16, 0, 8, 3)
    # Rows that are not aligned take registers for their loads.
    return Tiling(64 if D % 16 else 128, 64 if D % 16 else 128, 64, 0, 8, 3)


def join_blocks(interpreted: bool = False) -> dict[str, int]:
    return {"BP": 4, "BN": 16} if interpreted else {"BP": 16, "BN": 64}


def both_sides(problem: tuple, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(row_lse [G, B], col_lse [G, N]) in nats and fp64, of scores clamped to [-clip, clip]. `problem` as
    `triton_forward.stats` prepares it, B and N at least 1."""
    x, y, scale, *_, pairs, shift = problem
    (G, B, D), N = x.shape, y.shape[1]
    input_precision = precision(x.dtype, INTERPRETED)
    t = tiling(x.dtype, D, input_precision == "tf32", INTERPRETED)
    step = min(B, rows_of_chunk(G, N, x.element_size()))
    new = lambda *shape: torch.empty((G, *shape), dtype=lse_dtype(x.device), device=x.device)  # noqa: E731
    row, col = new(B), new(N)
    blocks = join_blocks(INTERPRETED)
    for first in range(0, B, step):
        n = min(step, B - first)
        row_parts, col_parts = triton.cdiv(N, t.BN), triton.cdiv(n, t.BM)
        parts = new(row_parts, n), new(col_parts, N)
        both_sides_kernel[(G * row_parts * col_parts,)](
            *problem[:-2], *parts, B, N, D, first, n, max(shift, 0),
            PAIRS=pairs, CLIP=None if clip == math.inf else clip, PRECISION=input_precision,
            BM=t.BM, BN=t.BN, BK=t.BK, GROUP=GROUP,
            num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        row_tiles = triton.cdiv(n, blocks["BN"])
        join_kernel[(G * (row_tiles + triton.cdiv(N, blocks["BN"])),)](
            *parts, row, col, B, N, first, n, row_parts, col_parts, row_tiles,
            ACC=tl.float64 if scale.dtype == torch.float64 else tl.float32, ADD=first > 0,
            num_warps=4, enable_fp_fusion=True, **blocks,
        )  # fmt: skip
    return row, col
