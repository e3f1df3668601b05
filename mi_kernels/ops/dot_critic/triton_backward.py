"""Gradients of the dot critic's statistics in Triton: scores are recomputed from the saved statistics.

    dS[i, j] = [allowed] (g_row_i exp(S_ij - row_lse_i) + g_col_j exp(S_ij - col_lse_j)
                          + g_soft_i sigma(S_ij))
             + g_pos_i [j is the positive of i]
             (sigma = softplus'; -sigma(-S) on a positive pair counted as softplus(-S))
    dx = scale dS y, dy = scale dS^T x, dscale = sum dS <x, y>, da = row sums of dS, db = column sums of dS

Two schedules, both deterministic; costs in units of N = 2 G B N D FLOPs:

* fused, while D fits one feature block BO: one kernel owns a tile of rows and BO of their
  features, walks over the other side and writes its gradient once. It runs twice, with x and y exchanged: 4N. It reads
  (B / BM) N D elements a launch, mostly from L2, and stores nothing but the outputs.
* chunked, for wider features: a kernel writes dS for as many rows as fit CHUNK_BYTES, LEAST_ROWS at least; two matmuls
  turn it into dx and, added inside the matmul, dy. 3N; dS goes through memory once, dy twice a chunk.
"""

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype
from ..common.precision import add_product, product
from ..common.triton import (
    as_vector,
    device_guard,
    dot_tile,
    load_tile,
    load_vector,
    mma,
    next_power,
    precision,
    sigmoid,
)
from .triton_common import MOST_COLUMNS, Tiling, allowed_tile, check, positive_tile, rows_of_chunk


@triton.jit
def load_lse(p, o_n, n):
    """A log-sum-exp; one over no pairs (-inf) becomes +inf, so that exp(S - lse) is 0 and never NaN."""
    b_lse = load_vector(p, o_n, n, float("inf"))
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse)


@triton.jit
def softplus_derivative(b_s, m_pos, SOFT_SIGNED: tl.constexpr):
    if SOFT_SIGNED:
        b_d = sigmoid(tl.where(m_pos, -b_s, b_s))
        return tl.where(m_pos, -b_d, b_d)
    else:
        return sigmoid(b_s)


@triton.jit
def dscores_tile(b_s, m, m_pos, m_pos_in, b_own_lse, b_own_g, b_oth_lse, b_oth_g, b_soft_g, b_pos_g,
                 SOFT_SIGNED: tl.constexpr):  # fmt: skip
    """dS of one tile: [BM, BN]. A weight that is None leaves its term out."""
    b_ds = tl.zeros_like(b_s)
    if b_own_g is not None:
        b_ds += b_own_g[:, None] * tl.exp(b_s - b_own_lse[:, None])
    if b_oth_g is not None:
        b_ds += b_oth_g[None, :] * tl.exp(b_s - b_oth_lse[None, :])
    if b_soft_g is not None:
        b_ds += b_soft_g * softplus_derivative(b_s, m_pos, SOFT_SIGNED)
    b_ds = tl.where(m, b_ds, 0.0)
    if b_pos_g is not None:
        b_ds += tl.where(m_pos_in, b_pos_g, 0.0)
    return b_ds


@triton.jit(do_not_specialize=["n_own", "n_oth", "shift"])
def grad_kernel(
    p_own, p_oth, p_scale, p_out_scale, p_own_bias, p_oth_bias, p_own_ids, p_oth_ids,
    p_own_lse, p_oth_lse, p_own_g, p_oth_g, p_soft_g, p_pos_g, p_out, p_out_bias, p_out_scale_rows,
    n_own, n_oth, D, shift,
    PAIRS: tl.constexpr, SOFT_SIGNED: tl.constexpr, SWAP: tl.constexpr, WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = p_scale.dtype.element_ty
    n_tiles = tl.cdiv(n_own, BM)
    n_blocks = tl.cdiv(D, BO)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_tiles * n_blocks)
    i_o = ((pid // n_tiles) % n_blocks).to(tl.int32)
    o_own = ((pid % n_tiles) * BM).to(tl.int32) + tl.arange(0, BM)
    o_o = i_o * BO + tl.arange(0, BO)
    p_own += i_g * n_own * D
    p_oth += i_g * n_oth * D
    n_row = n_oth if SWAP else n_own
    b_scale = tl.load(p_scale + i_g)
    b_own_ids = None
    if PAIRS >= 2:
        b_own_ids = load_vector(p_own_ids + i_g * n_own, o_own, n_own, 0)  # [BM]
    if p_own_bias is not None:
        b_own_bias = load_vector(p_own_bias + i_g * n_own, o_own, n_own, 0.0)  # [BM]
    b_own_lse, b_own_g = None, None
    if p_own_g is not None:
        b_own_lse = load_lse(p_own_lse + i_g * n_own, o_own, n_own)  # [BM]
        b_own_g = load_vector(p_own_g + i_g * n_own, o_own, n_own, 0.0)  # [BM]
    if WHOLE_D:
        b_own = load_tile(p_own, o_own, o_o, n_own, D)  # [BM, BO]

    b_out = tl.zeros([BM, BO], dtype=ACC)
    b_bias = tl.zeros([BM], dtype=ACC)
    b_dscale = tl.zeros([BM], dtype=ACC)
    for i_oth in range(0, n_oth, BN):
        o_oth = i_oth + tl.arange(0, BN)
        if WHOLE_D:
            b_oth = load_tile(p_oth, o_oth, o_o, n_oth, D)  # [BN, BO]
            b_dot = mma(b_own, tl.trans(b_oth), None, ACC, PRECISION)  # [BM, BN]
        else:
            b_dot = dot_tile(p_own, p_oth, o_own, o_oth, n_own, n_oth, D, ACC, PRECISION, BM, BN, BK)
        b_s = b_dot * b_scale
        if p_own_bias is not None:
            b_s += b_own_bias[:, None]
        if p_oth_bias is not None:
            b_s += load_vector(p_oth_bias + i_g * n_oth, o_oth, n_oth, 0.0)[None, :]
        b_oth_ids = None
        if PAIRS >= 2:
            b_oth_ids = load_vector(p_oth_ids + i_g * n_oth, o_oth, n_oth, 0)  # [BN]
        m_pos = None
        if (PAIRS == 3) or SOFT_SIGNED or (p_pos_g is not None):
            m_pos = positive_tile(o_own, o_oth, n_own, n_oth, shift, SWAP)
        m = allowed_tile(o_own, o_oth, b_own_ids, b_oth_ids, m_pos, n_own, n_oth, PAIRS)

        b_oth_lse, b_oth_g, b_soft_g, b_pos_g = None, None, None, None
        if p_oth_g is not None:
            b_oth_lse = load_lse(p_oth_lse + i_g * n_oth, o_oth, n_oth)  # [BN]
            b_oth_g = load_vector(p_oth_g + i_g * n_oth, o_oth, n_oth, 0.0)  # [BN]
        o_row = o_oth if SWAP else o_own
        if p_soft_g is not None:
            b_soft_g = load_vector(p_soft_g + i_g * n_row, o_row, n_row, 0.0)
            b_soft_g = b_soft_g[None, :] if SWAP else b_soft_g[:, None]
        if p_pos_g is not None:
            b_pos_g = load_vector(p_pos_g + i_g * n_row, o_row, n_row, 0.0)
            b_pos_g = b_pos_g[None, :] if SWAP else b_pos_g[:, None]
            m_pos_in = m_pos & (o_own < n_own)[:, None] & (o_oth < n_oth)[None, :]
        else:
            m_pos_in = None
        b_ds = dscores_tile(b_s, m, m_pos, m_pos_in, b_own_lse, b_own_g, b_oth_lse, b_oth_g, b_soft_g,
                            b_pos_g, SOFT_SIGNED)  # fmt: skip

        b_bias += tl.sum(b_ds, 1)
        if p_out_scale_rows is not None:
            b_dscale += tl.sum(b_ds * b_dot, 1)
        if not WHOLE_D:
            b_oth = load_tile(p_oth, o_oth, o_o, n_oth, D)  # [BN, BO]
        b_out = mma(b_ds.to(b_oth.dtype), b_oth, b_out, ACC, PRECISION)

    m_own = o_own < n_own
    b_out *= tl.load(p_out_scale + i_g)
    p_out += i_g * n_own * D
    tl.store(p_out + o_own.to(tl.int64)[:, None] * D + o_o[None, :], b_out.to(p_out.dtype.element_ty),
             mask=m_own[:, None] & (o_o < D)[None, :])  # fmt: skip
    if i_o == 0:
        tl.store(p_out_bias + i_g * n_own + o_own, b_bias, mask=m_own)
        if p_out_scale_rows is not None:
            tl.store(p_out_scale_rows + i_g * n_own + o_own, b_dscale, mask=m_own)


@triton.jit(do_not_specialize=["n_row", "n_col", "shift", "first", "n_chunk"])
def dscores_kernel(
    p_x, p_y, p_scale, p_row_bias, p_col_bias, p_row_ids, p_col_ids, p_row_lse, p_col_lse, p_row_g, p_col_g,
    p_soft_g, p_pos_g, p_ds, p_row_part, p_col_part,
    n_row, n_col, D, shift, first, n_chunk,
    PAIRS: tl.constexpr, SOFT_SIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dS of rows first .. first + n_chunk: [G, n_chunk, N], with the row and column sums of each tile."""
    ACC: tl.constexpr = p_scale.dtype.element_ty
    n_rows = tl.cdiv(n_chunk, BM)
    n_cols = tl.cdiv(n_col, BN)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_rows * n_cols)
    i_row = pid % n_rows
    i_col = (pid // n_rows) % n_cols
    o_chunk = (i_row * BM).to(tl.int32) + tl.arange(0, BM)
    o_row = first + o_chunk
    o_col = (i_col * BN).to(tl.int32) + tl.arange(0, BN)
    n_end = first + n_chunk
    p_x += i_g * n_row * D
    p_y += i_g * n_col * D
    b_s = dot_tile(p_x, p_y, o_row, o_col, n_end, n_col, D, ACC, PRECISION, BM, BN, BK)  # [BM, BN]
    b_s *= tl.load(p_scale + i_g)
    if p_row_bias is not None:
        b_s += load_vector(p_row_bias + i_g * n_row, o_row, n_end, 0.0)[:, None]
    if p_col_bias is not None:
        b_s += load_vector(p_col_bias + i_g * n_col, o_col, n_col, 0.0)[None, :]
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
        b_row_lse = load_lse(p_row_lse + i_g * n_row, o_row, n_end)  # [BM]
        b_row_g = load_vector(p_row_g + i_g * n_row, o_row, n_end, 0.0)  # [BM]
    if p_col_g is not None:
        b_col_lse = load_lse(p_col_lse + i_g * n_col, o_col, n_col)  # [BN]
        b_col_g = load_vector(p_col_g + i_g * n_col, o_col, n_col, 0.0)  # [BN]
    if p_soft_g is not None:
        b_soft_g = load_vector(p_soft_g + i_g * n_row, o_row, n_end, 0.0)[:, None]
    if p_pos_g is not None:
        b_pos_g = load_vector(p_pos_g + i_g * n_row, o_row, n_end, 0.0)[:, None]
    b_ds = dscores_tile(b_s, m, m_pos, m_pos_in, b_row_lse, b_row_g, b_col_lse, b_col_g, b_soft_g, b_pos_g,
                        SOFT_SIGNED)  # fmt: skip
    m_row, m_col = o_chunk < n_chunk, o_col < n_col
    p_ds += (i_g * n_chunk + i_row * BM) * n_col + i_col * BN
    o_tile = tl.arange(0, BM)[:, None] * n_col + tl.arange(0, BN)[None, :]  # 32 bits: half the registers
    tl.store(p_ds + o_tile, b_ds.to(p_ds.dtype.element_ty), mask=m_row[:, None] & m_col[None, :])
    tl.store(p_row_part + (i_g * n_cols + i_col) * n_chunk + o_chunk, tl.sum(b_ds, 1), mask=m_row)
    tl.store(p_col_part + (i_g * n_rows + i_row) * n_col + o_col, tl.sum(b_ds, 0), mask=m_col)


INTERPRETED = not isinstance(grad_kernel, triton.runtime.JITFunction)


def tiling(dtype: torch.dtype, D: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and feature size, all free of register spills on sm_80 and sm_90. Beyond BO features the
    chunked schedule runs."""
    if interpreted:
        return Tiling(32, 16, 16, 32, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, next_power(min(D, 32), 16), 4, 1)
    if dtype == torch.float32 and not tf32:
        return Tiling(64, 32, 16, next_power(min(D, 64), 16), 4, 1)
    # Rows that are not aligned take registers for their loads.
    width = next_power(min(D, 64 if D % 16 else 128), 16)
    if dtype == torch.float32:
        return Tiling(64, 32, width, width, 8, 2)
    # Gradients leave in fp32: at 128 features, 32 columns a step would spill on sm_80.
    BM, stages = (64, 1) if D % 16 else (128, 2)
    return Tiling(BM, 32 if width < 128 else 16, width, width, 8, stages)


def chunk_tiling(dtype: torch.dtype, D: int, tf32: bool, interpreted: bool = False) -> Tiling:
    if interpreted:
        return Tiling(32, 16, 16, 0, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, 0, 4, 1)
    if dtype == torch.float32:
        return Tiling(64, 64, 32, 0, 8, 2) if tf32 else Tiling(64, 32, 16, 0, 4, 2)
    return Tiling(64 if D % 16 else 128, 64, 64, 0, 8, 3)


def _launch(own, oth, scale, out_scale, own_bias, oth_bias, own_ids, oth_ids, own_lse, oth_lse, own_g, oth_g,
            g_soft, g_pos, out, out_bias, out_scale_rows, pairs, shift, signed, swap) -> None:  # fmt: skip
    G, n_own, D = own.shape
    input_precision = precision(own.dtype, INTERPRETED)
    t = tiling(own.dtype, D, input_precision == "tf32", INTERPRETED)
    grid = (G * triton.cdiv(n_own, t.BM) * triton.cdiv(D, t.BO),)
    grad_kernel[grid](
        own, oth, scale, out_scale, own_bias, oth_bias, own_ids, oth_ids, own_lse, oth_lse, own_g, oth_g,
        g_soft, g_pos, out, out_bias, out_scale_rows, n_own, oth.shape[1], D, max(shift, 0),
        PAIRS=pairs, SOFT_SIGNED=signed, SWAP=swap, WHOLE_D=t.BK >= D, PRECISION=input_precision,
        BM=t.BM, BN=t.BN, BK=t.BK, BO=t.BO,
        num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _chunked(x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col, g_soft,
             g_pos, pairs, shift, signed) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """All gradients through chunks of dS. dscale is <dS y, x>, for sum dS <x, y> = sum_i <x_i, (dS y)_i>."""
    (G, B, D), N, acc = x.shape, y.shape[1], scale.dtype
    if N > MOST_COLUMNS:
        raise ValueError(f"y must have at most {MOST_COLUMNS} rows where features are wide, got {N}")
    input_precision = precision(x.dtype, INTERPRETED)
    t = chunk_tiling(x.dtype, D, input_precision == "tf32", INTERPRETED)
    step = min(B, triton.cdiv(rows_of_chunk(G, N, x.element_size()), t.BM) * t.BM)
    buffer = torch.empty(G * step * N, dtype=x.dtype, device=x.device)
    dx, da = torch.empty_like(x, dtype=acc), torch.empty(G, B, dtype=acc, device=x.device)
    dy, db = torch.zeros(G, N, D, dtype=acc, device=x.device), torch.zeros(G, N, dtype=acc, device=x.device)
    dscale = torch.zeros_like(scale)
    for first in range(0, B, step):
        n = min(step, B - first)
        rows, cols = triton.cdiv(n, t.BM), triton.cdiv(N, t.BN)
        ds = buffer[: G * n * N].view(G, n, N)
        row_part = torch.empty(G, cols, n, dtype=acc, device=x.device)
        col_part = torch.empty(G, rows, N, dtype=acc, device=x.device)
        dscores_kernel[(G * rows * cols,)](
            x, y, scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col, g_soft, g_pos,
            ds, row_part, col_part, B, N, D, max(shift, 0), first, n,
            PAIRS=pairs, SOFT_SIGNED=signed, PRECISION=input_precision, BM=t.BM, BN=t.BN, BK=t.BK,
            num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        part = x[:, first : first + n]
        y_sum = product(ds, y)
        dscale += (y_sum * part).sum((1, 2))
        torch.mul(y_sum, out_scale[:, None, None], out=dx[:, first : first + n])
        add_product(dy, ds.mT, part)
        da[:, first : first + n] = row_part.sum(1)
        db += col_part.sum(1)
    return dx, dy.mul_(out_scale[:, None, None]), dscale, da, db


def _gain(weights: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A power of two near the largest weight. dS is linear in the weights; divided by it, its entries have
    the size of probabilities, which fp16 still resolves (1 / B of a softmax entry underflows for large B)."""
    largest = torch.stack([w.abs().amax() for w in weights if w.numel()] + [like.new_zeros(())]).amax()
    return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest))), 1.0).to(like.dtype)


def grad(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    row_bias: torch.Tensor | None,
    col_bias: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    col_ids: torch.Tensor | None,
    pairs: int,
    positive_shift: int,
    row_lse: torch.Tensor | None,
    col_lse: torch.Tensor | None,
    g_row: torch.Tensor | None,
    g_col: torch.Tensor | None,
    g_soft: torch.Tensor | None,
    g_pos: torch.Tensor | None,
    soft_signed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx [G, B, D], dy [G, N, D], dscale [G], drow_bias [G, B], dcol_bias [G, N]).

    All come in the accumulation type. `g_row` needs `row_lse`, `g_col`
    needs `col_lse`, `g_pos` a `positive_shift` >= 0. Raises as `triton_forward.stats` does. 4N FLOPs fused,
    3N chunked (see the module), N = 2 G B N D; besides the outputs O(B + N) memory, chunked also CHUNK_BYTES
    and an fp32 dy.
    """
    check(x, y, row_ids, col_ids, pairs, positive_shift, INTERPRETED)
    if (g_row is not None and row_lse is None) or (g_col is not None and col_lse is None):
        raise ValueError("g_row needs row_lse and g_col needs col_lse, got None")
    if g_pos is not None and positive_shift < 0:
        raise ValueError(f"g_pos needs a positive pair: positive_shift must be >= 0, got {positive_shift}")
    acc = accumulate_dtype(x.dtype)
    x, y = x.contiguous(), y.contiguous()
    scale, row_bias, col_bias, row_lse, col_lse, g_row, g_col, g_soft, g_pos = (
        as_vector(v, acc) for v in (scale, row_bias, col_bias, row_lse, col_lse, g_row, g_col, g_soft, g_pos)
    )
    row_ids, col_ids = (as_vector(v, torch.int64) if pairs >= 2 else None for v in (row_ids, col_ids))
    signed = soft_signed and g_soft is not None and positive_shift >= 0
    row_lse, col_lse = (None if g is None else v for g, v in ((g_row, row_lse), (g_col, col_lse)))
    dx, dy = torch.empty_like(x, dtype=acc), torch.empty_like(y, dtype=acc)
    da, db, dscale_rows = (torch.empty(t.shape[:2], dtype=acc, device=x.device) for t in (x, y, x))
    if 0 in (*x.shape, y.shape[1]):
        if x.shape[2] == 0 and x.shape[0] * x.shape[1] * y.shape[1]:
            raise ValueError("x and y must have at least one feature, got D = 0")
        return dx.zero_(), dy.zero_(), torch.zeros_like(scale), da.zero_(), db.zero_()

    D, tf32 = x.shape[2], precision(x.dtype, INTERPRETED) == "tf32"
    gain = None
    if x.dtype == torch.float16:
        gain = _gain([g for g in (g_row, g_col, g_soft, g_pos) if g is not None], scale)
        g_row, g_col, g_soft, g_pos = (None if g is None else g / gain for g in (g_row, g_col, g_soft, g_pos))
    out_scale = scale if gain is None else scale * gain
    with device_guard(x):
        if tiling(x.dtype, D, tf32, INTERPRETED).BO < D:
            dx, dy, dscale, da, db = _chunked(
                x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col, g_soft,
                g_pos, pairs, positive_shift, signed,
            )  # fmt: skip
            return (dx, dy, dscale, da, db) if gain is None else (dx, dy, dscale * gain, da * gain, db * gain)
        _launch(x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col,
                g_soft, g_pos, dx, da, dscale_rows, pairs, positive_shift, signed, False)  # fmt: skip
        _launch(y, x, scale, out_scale, col_bias, row_bias, col_ids, row_ids, col_lse, row_lse, g_col, g_row,
                g_soft, g_pos, dy, db, None, pairs, positive_shift, signed, True)  # fmt: skip
    dscale = dscale_rows.sum(1)
    if gain is not None:
        dscale, da, db = dscale * gain, da * gain, db * gain
    return dx, dy, dscale, da, db
