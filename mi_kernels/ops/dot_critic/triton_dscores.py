"""Gradients of the dot critic's statistics through chunks of dS, in Triton: triton_backward.py has the mathematics.

`dscores_kernel` recomputes the scores of as many rows as fit CHUNK_BYTES, LEAST_ROWS at least, and writes their dS; two
matmuls turn it into dx and, added inside the matmul, dy. 3N FLOPs; dS goes through memory once, dy twice a chunk. Where
rows and columns both have weights, one exponential per pair serves both, E_ij = exp(S_ij - row_lse_i):

    exp(S_ij - col_lse_j) = E_ij exp(row_lse_i - low) exp(low - col_lse_j),   low the smallest col_lse of the tile

unless log-sum-exps of a tile are so far apart that these factors could overflow or E underflow. Deterministic.
"""

import torch
import triton
import triton.language as tl

from ..common.precision import add_product, product
from ..common.triton import hopper, load_vector, precision, sigmoid
from .schema import NEED_COL_BIAS, NEED_ROW_BIAS, NEED_SCALE, NEED_X, NEED_Y, UNEQUAL_IDS
from .triton_common import GROUP, MOST_COLUMNS, Tiling, allowed_tile, place, positive_tile, rows_of_chunk, score_tile

_SPAN = tl.constexpr(40.0)  # nats; exp(2 * SPAN) is finite, exp(-SPAN) times a probability is nothing


@triton.jit
def load_lse(p, p_g, o_n, n, ACC: tl.constexpr):
    """A log-sum-exp in ACC and its slope, into which goes what rounding the log-sum-exp loses. One over no pairs (-inf)
    becomes +inf, so that exp(S - lse) is 0 and never NaN."""
    b_exact = load_vector(p, o_n, n, float("inf"))
    b_g = load_vector(p_g, o_n, n, 0.0)
    b_lse = b_exact.to(ACC)
    b_lost = (b_lse.to(tl.float64) - b_exact).to(ACC)  # NaN for infinities
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse), tl.where(b_lost == b_lost, b_g * tl.exp(b_lost), b_g)


@triton.jit
def softplus_derivative(b_s, m_pos, SOFT_SIGNED: tl.constexpr):
    if SOFT_SIGNED:
        b_d = sigmoid(tl.where(m_pos, -b_s, b_s))
        return tl.where(m_pos, -b_d, b_d)
    else:
        return sigmoid(b_s)


@triton.jit
def softmaxes(b_s, b_own_lse, b_own_g, b_oth_lse, b_oth_g):
    """g_own exp(S - own_lse) + g_oth exp(S - oth_lse) of a tile; a weight that is None leaves its term out."""
    b_ds = tl.zeros_like(b_s)
    if b_own_g is not None:
        b_ds += b_own_g[:, None] * tl.exp(b_s - b_own_lse[:, None])
    if b_oth_g is not None:
        b_ds += b_oth_g[None, :] * tl.exp(b_s - b_oth_lse[None, :])
    return b_ds


@triton.jit
def shared_softmaxes(b_s, m_own, m_oth, b_own_lse, b_own_g, b_oth_lse, b_oth_g):
    """`softmaxes` of both sides, from one exponential per pair where log-sum-exps are close: E_ij = exp(S_ij - own_i),
    exp(S_ij - oth_j) = E_ij exp(own_i - low) exp(low - oth_j). m_own and m_oth say which are inside."""
    own_max = tl.max(tl.where(m_own, b_own_lse, -float("inf")), 0)
    own_min = tl.min(tl.where(m_own, b_own_lse, float("inf")), 0)
    oth_max = tl.max(tl.where(m_oth, b_oth_lse, -float("inf")), 0)
    oth_min = tl.min(tl.where(m_oth, b_oth_lse, float("inf")), 0)
    if (own_max - oth_min < _SPAN) & (oth_max - own_min < _SPAN):
        b_up = tl.where(m_own, tl.exp(b_own_lse - oth_min), 0.0)  # [BM]
        b_down = b_oth_g * tl.exp(oth_min - b_oth_lse)  # [BN]
        b_ds = tl.exp(b_s - b_own_lse[:, None]) * (b_own_g[:, None] + b_up[:, None] * b_down[None, :])
    else:  # NaN and rows without pairs come here too
        b_ds = softmaxes(b_s, b_own_lse, b_own_g, b_oth_lse, b_oth_g)
    return b_ds


@triton.jit
def dscores_tile(b_s, m, m_pos, m_pos_in, m_own, m_oth, b_own_lse, b_own_g, b_oth_lse, b_oth_g, b_soft_g, b_pos_g,
                 SOFT_SIGNED: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
    """dS of one tile: [BM, BN]. A weight that is None leaves its term out."""
    if SHARE:
        b_ds = shared_softmaxes(b_s, m_own, m_oth, b_own_lse, b_own_g, b_oth_lse, b_oth_g)
    else:
        b_ds = softmaxes(b_s, b_own_lse, b_own_g, b_oth_lse, b_oth_g)
    if b_soft_g is not None:
        b_ds += b_soft_g * softplus_derivative(b_s, m_pos, SOFT_SIGNED)
    b_ds = tl.where(m, b_ds, 0.0)
    if b_pos_g is not None:
        b_ds += tl.where(m_pos_in, b_pos_g, 0.0)
    return b_ds


@triton.jit(do_not_specialize=["n_row", "n_col", "shift", "first", "n_chunk"])
def dscores_kernel(
    p_x, p_y, p_scale, p_row_bias, p_col_bias, p_row_ids, p_col_ids, p_row_lse, p_col_lse, p_row_g, p_col_g,
    p_soft_g, p_pos_g, p_ds, p_row_sum, p_col_sum,
    n_row, n_col, D, shift, first, n_chunk,
    PAIRS: tl.constexpr, SOFT_SIGNED: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dS of rows first .. first + n_chunk: [G, n_chunk, N], and the row and column sums of each tile where asked for.
    SHARE: both sides have weights, and one exponential may serve both."""
    ACC: tl.constexpr = p_scale.dtype.element_ty
    i_g, i_row, i_col = place(n_chunk, n_col, BM, BN, GROUP)
    o_chunk = (i_row * BM).to(tl.int32) + tl.arange(0, BM)
    o_row = first + o_chunk
    o_col = (i_col * BN).to(tl.int32) + tl.arange(0, BN)
    n_end = first + n_chunk
    b_s = score_tile(p_x, p_y, p_scale, p_row_bias, p_col_bias, i_g, o_row, o_col, n_row, n_end, n_col, D,
                     ACC, PRECISION, BM, BN, BK)  # fmt: skip
    b_row_ids, b_col_ids, m_pos, m_pos_in = None, None, None, None
    if PAIRS >= 2:
        b_row_ids = load_vector(p_row_ids + i_g * n_row, o_row, n_end, 0)  # [BM]
        b_col_ids = load_vector(p_col_ids + i_g * n_col, o_col, n_col, 0)  # [BN]
    if (PAIRS == 3) or SOFT_SIGNED or (p_pos_g is not None):
        m_pos = positive_tile(o_row, o_col, n_row, n_col, shift, False)
        m_pos_in = m_pos & (o_row < n_end)[:, None]
    m = allowed_tile(o_row, o_col, b_row_ids, b_col_ids, m_pos, n_end, n_col, PAIRS)
    b_row_lse, b_row_g, b_col_lse, b_col_g, b_soft_g, b_pos_g = None, None, None, None, None, None
    if p_row_g is not None:
        b_row_lse, b_row_g = load_lse(p_row_lse + i_g * n_row, p_row_g + i_g * n_row, o_row, n_end, ACC)  # [BM]
    if p_col_g is not None:
        b_col_lse, b_col_g = load_lse(p_col_lse + i_g * n_col, p_col_g + i_g * n_col, o_col, n_col, ACC)  # [BN]
    if p_soft_g is not None:
        b_soft_g = load_vector(p_soft_g + i_g * n_row, o_row, n_end, 0.0)[:, None]
    if p_pos_g is not None:
        b_pos_g = load_vector(p_pos_g + i_g * n_row, o_row, n_end, 0.0)[:, None]
    m_row, m_col = o_chunk < n_chunk, o_col < n_col
    b_ds = dscores_tile(b_s, m, m_pos, m_pos_in, m_row, m_col, b_row_lse, b_row_g, b_col_lse, b_col_g, b_soft_g,
                        b_pos_g, SOFT_SIGNED, SHARE)  # fmt: skip
    p_ds += (i_g * n_chunk + i_row * BM) * n_col + i_col * BN
    o_tile = tl.arange(0, BM)[:, None] * n_col + tl.arange(0, BN)[None, :]  # 32 bits: half the registers
    tl.store(p_ds + o_tile, b_ds.to(p_ds.dtype.element_ty), mask=m_row[:, None] & m_col[None, :])
    if p_row_sum is not None:
        o_part = (i_g * tl.cdiv(n_col, BN) + i_col) * n_chunk + o_chunk
        tl.store(p_row_sum + o_part, tl.sum(b_ds, 1), mask=m_row)
    if p_col_sum is not None:
        o_part = (i_g * tl.cdiv(n_chunk, BM) + i_row) * n_col + o_col
        tl.store(p_col_sum + o_part, tl.sum(b_ds, 0), mask=m_col)


INTERPRETED = not isinstance(dscores_kernel, triton.runtime.JITFunction)


def chunk_tiling(dtype: torch.dtype, D: int, tf32: bool, wide: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and feature size, all free of register spills on sm_80 and sm_90. `wide`: from Hopper on,
    with log-sum-exps or softplus alone, and without ids and biases, which need more registers."""
    if interpreted:
        return Tiling(32, 16, 16, 0, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, 0, 4, 1)
    if dtype == torch.float32:
        return Tiling(64, 64, 32, 0, 8, 2) if tf32 else Tiling(64, 32, 16, 0, 4, 2)
    return Tiling(64, 64, 64, 0, 8, 3) if D % 16 else Tiling(128, 128 if wide else 64, 64, 0, 8, 3)


def stored(x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col, g_soft,
           g_pos, pairs, shift, signed, needs) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients through chunks of dS, None where `needs` does not ask. dscale is <dS y, x>, for
    sum dS <x, y> = sum_i <x_i, (dS y)_i>."""
    (G, B, D), N, acc = x.shape, y.shape[1], scale.dtype
    if N > MOST_COLUMNS:
        raise ValueError(f"y must have at most {MOST_COLUMNS} rows where features are wide, got {N}")
    input_precision = precision(x.dtype, INTERPRETED)
    biased = row_bias is not None or col_bias is not None or needs & (NEED_ROW_BIAS | NEED_COL_BIAS)
    mixed = g_soft is not None and (g_row is not None or g_col is not None)
    wide = not (biased or mixed or pairs >= UNEQUAL_IDS) and hopper(x.device)
    t = chunk_tiling(x.dtype, D, input_precision == "tf32", wide, INTERPRETED)
    step = min(B, triton.cdiv(rows_of_chunk(G, N, x.element_size()), t.BM) * t.BM)
    new = lambda *shape, dtype=acc: torch.empty((G, *shape), dtype=dtype, device=x.device)  # noqa: E731
    buffer = new(step * N, dtype=x.dtype)
    dx = new(B, D) if needs & (NEED_X | NEED_SCALE) else None
    dy = torch.zeros_like(y, dtype=acc) if needs & NEED_Y else None
    da = new(B) if needs & NEED_ROW_BIAS else None
    db = torch.zeros(G, N, dtype=acc, device=x.device) if needs & NEED_COL_BIAS else None
    for first in range(0, B, step):
        n = min(step, B - first)
        rows, cols, part = triton.cdiv(n, t.BM), triton.cdiv(N, t.BN), slice(first, first + n)
        ds = buffer.flatten()[: G * n * N].view(G, n, N)
        row_part, col_part = None if da is None else new(cols, n), None if db is None else new(rows, N)
        dscores_kernel[(G * rows * cols,)](
            x, y, scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col, g_soft, g_pos,
            ds, row_part, col_part, B, N, D, max(shift, 0), first, n,
            PAIRS=pairs, SOFT_SIGNED=signed, SHARE=g_row is not None and g_col is not None,
            PRECISION=input_precision, BM=t.BM, BN=t.BN, BK=t.BK, GROUP=GROUP,
            num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if dx is not None:
            if step < B:
                dx[:, part] = product(ds, y)
            else:
                dx = product(ds, y)
        if dy is not None:
            add_product(dy, ds.mT, x[:, part])
        if da is not None and row_part is not None:
            torch.sum(row_part, 1, out=da[:, part])
        if db is not None and col_part is not None:
            db += col_part.sum(1)
    dscale = (dx * x).sum((1, 2)) if dx is not None and needs & NEED_SCALE else None
    dx, dy = (None if d is None else d.mul_(out_scale[:, None, None]) for d in (dx, dy))
    return dx, dy, dscale, da, db
