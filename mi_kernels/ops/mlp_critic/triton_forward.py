"""Scores and statistics of the MLP critic in Triton; neither activations nor scores leave a tile.

    z[p, k] = sum_l W2[k, l] act(u_i + v_j)[l] + b2[k]      p = (i, j)
    S[p]    = out(sum_k w[k] act(z[p, k]) + b)              or out(sum_l w[l] act(u_i + v_j)[l] + b), one hidden layer

A program owns a tile of P = BI BJ pairs and walks over blocks of H2 and, inside, of H1: the first layer's activations
are built in registers from BI + BJ vectors, multiplied with a block of W2, and reduced against w before the next block.
Of the tile's scores it writes log-sums and sums over its rows and columns; torch adds up the tiles in a fixed order.

M = 2 G B N H1 H2 FLOPs. The first layer's activations are evaluated H2 / BN times. A program reads W2 and H1 (BI + BJ)
values per block of H2, from L2; what it writes is 4 bytes times (1 / BJ per row statistic + 1 / BI for columns) per
pair, in chunks of at most `memory_budget` bytes. Scores, bits of z > 0, or z itself are written only for a backward.
Block sizes follow from registers and shared memory; no GPU has timed them yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, load_tile, load_vector, mma, softplus, tile_lse
from . import triton_matmuls
from .schema import CLIPPED_ROW_LSE, COL_LSE, PIECEWISE_LINEAR, ROW_LSE, ROW_SOFTPLUS, kept_shapes
from .triton_common import (
    INTERPRETED,
    Critic,
    Tiling,
    activate,
    block,
    chunks,
    critic,
    hidden_tile,
    mode,
    operand,
)


@triton.jit
def store_bits(p_bits, b_z, o_i, o_j, m, i_k, n_words, pitch, P: tl.constexpr, BN: tl.constexpr):
    """Bit k of a word says whether its k-th unit is positive; words i_k / 32 and on of pairs (o_i, o_j) [P]."""
    b_bits = tl.reshape((b_z > 0.0).to(tl.int32), [P, BN // 32, 32]) << tl.arange(0, 32)[None, None, :]
    o_word = i_k // 32 + tl.arange(0, BN // 32)
    p = p_bits + (o_i.to(tl.int64)[:, None] * n_words + o_word[None, :]) * pitch + o_j[:, None]
    # Different powers of two: their sum is their union, the highest as the sign.
    tl.store(p, tl.sum(b_bits, 2), mask=m[:, None] & (o_word < n_words)[None, :])


@triton.jit
def store_row_part(p_part, b_part, o_i, n_rows, i_tile, n_tiles, i_g):
    if p_part is not None:
        tl.store(p_part + (i_g * n_tiles + i_tile) * n_rows + o_i, b_part, mask=o_i < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "shift", "own"])
def scores_kernel(
    p_u, p_v, p_w2, p_b2, p_w, p_b, p_scores, p_bits, p_z,
    p_positive, p_row_sum, p_row_lse, p_row_soft, p_clipped, p_col_lse,
    n_rows, n_cols, shift, pitch, H1, H2, own,
    ACT: tl.constexpr, SOFTPLUS: tl.constexpr, OFF_DIAGONAL: tl.constexpr, CLIP: tl.constexpr, LAYERS: tl.constexpr,
    PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LAYERS: hidden layers; 0 for statistics of the scores that are given."""
    DTYPE: tl.constexpr = p_w.dtype.element_ty  # of the products; u and v may be wider
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    TERMS: tl.constexpr = 17 if DTYPE == tl.float64 else 8
    P: tl.constexpr = BI * BJ
    n_row_tiles = tl.cdiv(n_rows, BI)
    n_col_tiles = tl.cdiv(n_cols, BJ)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_row_tiles * n_col_tiles)
    i_row = (pid // n_col_tiles) % n_row_tiles
    i_col = pid % n_col_tiles
    r0, c0 = (i_row * BI).to(tl.int32), (i_col * BJ).to(tl.int32)
    o_i, o_j = r0 + tl.arange(0, BI), c0 + tl.arange(0, BJ)
    o_pi, o_pj = r0 + tl.arange(0, P) // BJ, c0 + tl.arange(0, P) % BJ  # of each pair of the tile
    m_pair = (o_pi < n_rows) & (o_pj < n_cols)  # [P]
    p_u += i_g * n_rows * H1
    p_v += i_g * n_cols * H1
    i_w = i_g * own

    b_s = tl.zeros([P], dtype=ACC)
    if LAYERS == 0:
        b_s = tl.load(p_scores + (i_g * n_rows + o_pi) * pitch + o_pj, mask=m_pair, other=0.0)
    elif LAYERS == 2:
        for i_k in range(0, H2, BN):
            o_k = i_k + tl.arange(0, BN)
            b_z = tl.zeros([P, BN], dtype=ACC)
            for i_l in range(0, H1, BK):
                o_l = i_l + tl.arange(0, BK)
                b_h = hidden_tile(p_u, p_v, o_i, o_j, o_l, n_rows, n_cols, H1, ACC, BI, BJ, BK)
                b_h = operand(activate(b_h, ACT), DTYPE, PRECISION)  # [P, BK]
                b_w2 = load_tile(p_w2 + i_w * H2 * H1, o_k, o_l, H2, H1)  # [BN, BK]
                b_z = mma(b_h, tl.trans(b_w2), b_z, ACC, PRECISION)
            b_z += load_vector(p_b2 + i_w * H2, o_k, H2, 0.0).to(ACC)[None, :]
            if p_bits is not None:
                n_words = tl.cdiv(H2, 32)
                store_bits(p_bits + i_g * n_rows * n_words * pitch, b_z, o_pi, o_pj, m_pair, i_k, n_words, pitch, P, BN)
            if p_z is not None:
                p = p_z + ((i_g * n_rows + o_pi) * n_cols + o_pj)[:, None] * H2 + o_k[None, :]
                tl.store(p, b_z.to(DTYPE), mask=m_pair[:, None] & (o_k < H2)[None, :])
            b_w = load_vector(p_w + i_w * H2, o_k, H2, 0.0).to(ACC)  # [BN]
            b_s += tl.sum(activate(b_z, ACT) * b_w[None, :], 1)
    else:
        for i_l in range(0, H1, BK):
            o_l = i_l + tl.arange(0, BK)
            b_h = hidden_tile(p_u, p_v, o_i, o_j, o_l, n_rows, n_cols, H1, ACC, BI, BJ, BK)
            b_w = load_vector(p_w + i_w * H1, o_l, H1, 0.0).to(ACC)  # [BK]
            b_s += tl.sum(activate(b_h, ACT) * b_w[None, :], 1)
    if LAYERS != 0:
        b_s += tl.load(p_b + i_w).to(ACC)
        if p_scores is not None:
            tl.store(p_scores + (i_g * n_rows + o_pi) * pitch + o_pj, b_s, mask=m_pair)

    if p_row_sum is not None:
        if SOFTPLUS:
            b_s = softplus(b_s, TERMS)
        b_s = tl.reshape(b_s, [BI, BJ])
        m_diagonal = (o_i + shift)[:, None] == o_j[None, :]
        m = (o_i < n_rows)[:, None] & (o_j < n_cols)[None, :]
        if p_positive is not None:
            p = p_positive + i_g * n_rows + o_i[:, None] + tl.zeros_like(o_j)[None, :]
            tl.store(p, b_s, mask=m & m_diagonal)
        if OFF_DIAGONAL:
            m = m & ~m_diagonal
        store_row_part(p_row_sum, tl.sum(tl.where(m, b_s, 0.0), 1), o_i, n_rows, i_col, n_col_tiles, i_g)
        if p_row_soft is not None:
            b_soft = tl.sum(tl.where(m, softplus(b_s, TERMS), 0.0), 1)
            store_row_part(p_row_soft, b_soft, o_i, n_rows, i_col, n_col_tiles, i_g)
        if p_clipped is not None:
            b_c = tl.where(b_s > CLIP, CLIP, tl.where(b_s < -CLIP, -CLIP, b_s)).to(ACC)
            b_c = tile_lse(tl.where(m, b_c, -float("inf")), 1)
            store_row_part(p_clipped, b_c, o_i, n_rows, i_col, n_col_tiles, i_g)
        b_s = tl.where(m, b_s, -float("inf"))
        if p_row_lse is not None:
            store_row_part(p_row_lse, tile_lse(b_s, 1), o_i, n_rows, i_col, n_col_tiles, i_g)
        if p_col_lse is not None:
            store_row_part(p_col_lse, tile_lse(b_s, 0), o_j, n_cols, i_row, n_row_tiles, i_g)


def tiling(dtype: torch.dtype, H2: int, tf32: bool, activation: str, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype, widths and activation, all free of register spills on sm_80 and sm_90."""
    if interpreted:
        return Tiling(8, 16, 32, 32, 4, 1)
    if dtype == torch.float64:
        return Tiling(4, 8, 32, 32, 8, 1)
    if dtype == torch.float32 and not tf32:
        return Tiling(4 if H2 % 16 else 8, 8, 32, 16, 8, 2)
    if dtype == torch.float32:
        return Tiling(8, 16, block(H2, 32, 64), 32, 8, 2)
    if activation in PIECEWISE_LINEAR:
        # Rows that are not aligned take registers for their loads.
        return Tiling(8, 16, block(H2, 32, 64 if H2 % 16 else 128), 32, 8, 3)
    # On sm_80 SiLU spills at two stages, tanh at three.
    return Tiling(8, 16, block(H2, 32, 64), 32, 8, 3 if activation == "silu" else 2)


def launch_scores(
    k: Critic,
    shift: int,
    off_diagonal: bool,
    clip: float | None,
    *,
    scores: Tensor | None = None,
    given: bool = False,
    bits: Tensor | None = None,
    z: Tensor | None = None,
    parts: Sequence[Tensor | None] = (None,) * 6,
) -> None:
    """Runs `scores_kernel` on a chunk, whose scores are there already where they are `given`. `parts` are positive
    [G, R] and, by tile, row_sum, row_lse, row_softplus, clipped [G, column tiles, R] and col_lse [G, row tiles, N]."""
    G, rows, columns = k.sizes
    H1, H2 = k.widths
    precision = mode(k.dtype)
    t = tiling(k.dtype, H2, precision == "tf32", k.activation, INTERPRETED)
    pitch = columns if scores is None else scores.stride(1)
    scores_kernel[(G * triton.cdiv(rows, t.BI) * triton.cdiv(columns, t.BJ),)](
        k.u, k.v, k.w2, k.b2, k.w, k.b, scores, bits, z, *parts,
        rows, columns, shift, pitch, H1, H2, int(k.own),
        ACT=k.activation, SOFTPLUS=k.output == "softplus", OFF_DIAGONAL=off_diagonal,
        CLIP=None if parts[4] is None else clip, LAYERS=0 if given else 2 if H2 else 1, PRECISION=precision,
        BI=t.BI, BJ=t.BJ, BN=t.BN, BK=t.BK, num_warps=t.num_warps, num_stages=t.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip


def _stored_scores(k: Critic, memory_budget: int) -> Tensor:
    """Scores [G, R, N] of a chunk, through chunks of it whose layers are stored."""
    scores = torch.empty(k.sizes, dtype=k.accumulator, device=k.u.device)
    for at in chunks(k.sizes, triton_matmuls.pair_bytes(k), memory_budget, 1, 16):
        scores[at] = triton_matmuls.layers(k.chunk(*at))[0]
    return scores


def forward(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    output: str,
    off_diagonal: bool,
    stats: int,
    clip: float,
    keep: bool,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    """The six statistics of schema.py and what is kept for the backward, empty without `keep`.

    M = 2 G B N H1 H2 FLOPs; besides the outputs, at most `memory_budget` bytes. Each value of `clip` is compiled
    once. Raises as `triton_common.critic` does.
    """
    k = critic(u, v, weights, biases, activation, output)
    stored = not keep and triton_matmuls.suits(k, memory_budget)
    G, B, N = k.sizes
    acc = accumulate_dtype(u.dtype)
    new = lambda *shape, dtype=acc: torch.empty(shape, dtype=dtype, device=u.device)  # noqa: E731
    wanted = (True, *(bool(stats & bit) for bit in (ROW_LSE, ROW_SOFTPLUS, CLIPPED_ROW_LSE)))
    positive = new(G, B if B == N else 0)
    by_row = [new(G, B if w else 0) for w in wanted]
    col_lse = torch.full((G, N if stats & COL_LSE else 0), -torch.inf, dtype=acc, device=u.device)
    kept_scores, kept_bits = (None, None)
    if keep:
        shapes = kept_shapes(G, B, N, weights[0].shape[1], "triton")
        kept_scores, kept_bits = new(*shapes[0]), new(*shapes[1], dtype=torch.int32)
    t = tiling(k.dtype, k.widths[1], mode(k.dtype) == "tf32", activation, INTERPRETED)
    of_kept = lambda t, *at: None if t is None else t[at]  # noqa: E731
    tile_bytes = acc.itemsize * (t.BI * sum(wanted) + t.BJ * bool(stats & COL_LSE))
    pair_bytes = -(-tile_bytes // (t.BI * t.BJ)) + (acc.itemsize if stored else 0)
    with device_guard(u):
        # Columns are never split: a row's statistics are complete with its chunk.
        for g, r, _ in chunks((G, B, N), pair_bytes, memory_budget, t.BI, N):
            part = k.chunk(g, r, slice(0, N))
            n, rows, row_tiles = part.u.shape[0], part.u.shape[1], triton.cdiv(part.u.shape[1], t.BI)
            tiles = [new(n, triton.cdiv(N, t.BJ), rows) if w else None for w in wanted]
            columns = new(n, row_tiles, N) if stats & COL_LSE else None
            launch_scores(
                part, r.start, off_diagonal, clip, given=stored,
                scores=_stored_scores(part, memory_budget) if stored else of_kept(kept_scores, g, r),
                bits=of_kept(kept_bits, g, r),
                parts=(positive[g, r] if B == N else None, *tiles, columns),
            )  # fmt: skip
            for out, tile in zip(by_row, tiles, strict=True):
                if tile is not None:
                    out[g, r] = tile.sum(1) if out is by_row[0] or out is by_row[2] else tile.logsumexp(1)
            if columns is not None:
                col_lse[g] = torch.logaddexp(col_lse[g], columns.logsumexp(1))
    row_sum, row_lse, row_soft, clipped = by_row
    empty = new(0), new(0, dtype=torch.int32)
    kept = empty if kept_scores is None else (kept_scores, kept_bits)
    return positive, row_lse, col_lse, row_sum, row_soft, clipped, *kept
