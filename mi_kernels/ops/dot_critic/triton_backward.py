"""Gradients of the dot critic's statistics in Triton: scores are recomputed from the saved statistics.

    dS[i, j] = [allowed] (g_row_i exp(S_ij - row_lse_i) + g_col_j exp(S_ij - col_lse_j)
                          + g_soft_i sigma(S_ij))
             + g_pos_i [j is the positive of i]
             (sigma = softplus'; -sigma(-S) on a positive pair counted as softplus(-S))
    dx = scale dS y, dy = scale dS^T x, dscale = sum dS <x, y>, da = row sums of dS, db = column sums of dS

Two schedules, both deterministic; costs in units of N = 2 G B N D FLOPs:

* fused, while D fits one feature block BO: one kernel owns a tile of rows, walks over the other side and writes its
  gradient once. It runs twice, with x and y exchanged: 4N. It reads (B / BM) N D elements a launch, mostly from L2, and
  stores nothing but the outputs.
* stored, for wider features, in triton_dscores.py: 3N.
"""

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype, lse_dtype
from ..common.triton import as_vector, device_guard, dot_tile, load_tile, load_vector, mma, next_power, precision
from .schema import ALL_GRADIENTS, GRADIENTS, NEED_COL_BIAS, NEED_ROW_BIAS, NEED_SCALE, NEED_X, NEED_Y
from .triton_common import Tiling, allowed_tile, check, positive_tile
from .triton_dscores import dscores_tile, load_lse, stored


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
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // n_tiles
    o_own = ((pid % n_tiles) * BM).to(tl.int32) + tl.arange(0, BM)
    o_o = tl.arange(0, BO)
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
        b_own_lse, b_own_g = load_lse(p_own_lse + i_g * n_own, p_own_g + i_g * n_own, o_own, n_own, ACC)  # [BM]
    if WHOLE_D:
        b_own = load_tile(p_own, o_own, o_o, n_own, D)  # [BM, BO]

    b_out = tl.zeros([BM, BO], dtype=ACC)
    b_bias = tl.zeros([BM], dtype=ACC)
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
            b_oth_lse, b_oth_g = load_lse(p_oth_lse + i_g * n_oth, p_oth_g + i_g * n_oth, o_oth, n_oth, ACC)  # [BN]
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
        b_ds = dscores_tile(b_s, m, m_pos, m_pos_in, None, None, b_own_lse, b_own_g, b_oth_lse, b_oth_g, b_soft_g,
                            b_pos_g, SOFT_SIGNED, False)  # fmt: skip

        b_bias += tl.sum(b_ds, 1)
        if not WHOLE_D:
            b_oth = load_tile(p_oth, o_oth, o_o, n_oth, D)  # [BN, BO]
        if PRECISION != "upcast":  # the interpreter would cut off to bfloat16 instead of rounding
            b_ds = b_ds.to(b_oth.dtype)
        b_out = mma(b_ds, b_oth, b_out, ACC, PRECISION)

    m_own = o_own < n_own
    tl.store(p_out_bias + i_g * n_own + o_own, b_bias, mask=m_own)
    if p_out_scale_rows is not None:
        # sum_j dS_ij <x_i, y_j> = <x_i, (dS y)_i>: fewer registers than a sum within the loop
        if not WHOLE_D:
            b_own = load_tile(p_own, o_own, o_o, n_own, D)
        tl.store(p_out_scale_rows + i_g * n_own + o_own, tl.sum(b_out * b_own.to(ACC), 1), mask=m_own)
    b_out *= tl.load(p_out_scale + i_g)
    p_out += i_g * n_own * D
    tl.store(p_out + o_own.to(tl.int64)[:, None] * D + o_o[None, :], b_out.to(p_out.dtype.element_ty),
             mask=m_own[:, None] & (o_o < D)[None, :])  # fmt: skip


INTERPRETED = not isinstance(grad_kernel, triton.runtime.JITFunction)


def tiling(dtype: torch.dtype, D: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and feature size, all free of register spills on sm_80 and sm_90. Beyond BO features the
    stored schedule runs."""
    if interpreted:
        return Tiling(32, 16, 16, 32, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, next_power(min(D, 32), 16), 4, 1)
    if dtype == torch.float32 and not tf32:
        return Tiling(64, 32, 16, next_power(min(D, 64), 16), 4, 2 if D % 16 else 3)
    # Rows that are not aligned take registers for their loads.
    width = next_power(min(D, 64 if D % 16 else 128), 16)
    if dtype == torch.float32:
        return Tiling(64, 32, width, width, 8, 2)
    # Gradients leave in fp32: at 128 features, 32 columns a step would spill on sm_80.
    BM, stages = (64, 1) if D % 16 else (128, 2)
    return Tiling(BM, 32 if width < 128 else 16, width, width, 8, stages)


def _launch(own, oth, scale, out_scale, own_bias, oth_bias, own_ids, oth_ids, own_lse, oth_lse, own_g, oth_g,
            g_soft, g_pos, out, out_bias, out_scale_rows, pairs, shift, signed, swap) -> None:  # fmt: skip
    G, n_own, D = own.shape
    input_precision = precision(own.dtype, INTERPRETED)
    t = tiling(own.dtype, D, input_precision == "tf32", INTERPRETED)
    grad_kernel[(G * triton.cdiv(n_own, t.BM),)](
        own, oth, scale, out_scale, own_bias, oth_bias, own_ids, oth_ids, own_lse, oth_lse, own_g, oth_g,
        g_soft, g_pos, out, out_bias, out_scale_rows, n_own, oth.shape[1], D, max(shift, 0),
        PAIRS=pairs, SOFT_SIGNED=signed, SWAP=swap, WHOLE_D=t.BK >= D, PRECISION=input_precision,
        BM=t.BM, BN=t.BN, BK=t.BK, BO=t.BO,
        num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _fused(x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col, g_soft,
           g_pos, pairs, shift, signed, needs) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients by the owners of rows and of columns, None where `needs` does not ask."""
    acc = scale.dtype
    dx, dy, da, db, dscale = None, None, None, None, None
    if needs & (NEED_X | NEED_SCALE | NEED_ROW_BIAS):
        dx = torch.empty_like(x, dtype=acc)
        da, dscale = (torch.empty(x.shape[:2], dtype=acc, device=x.device) for _ in range(2))
        _launch(x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids, row_lse, col_lse, g_row, g_col,
                g_soft, g_pos, dx, da, dscale, pairs, shift, signed, False)  # fmt: skip
        dscale = dscale.sum(1) if needs & NEED_SCALE else None
    if needs & (NEED_Y | NEED_COL_BIAS):
        dy, db = torch.empty_like(y, dtype=acc), torch.empty(y.shape[:2], dtype=acc, device=y.device)
        _launch(y, x, scale, out_scale, col_bias, row_bias, col_ids, row_ids, col_lse, row_lse, g_col, g_row,
                g_soft, g_pos, dy, db, None, pairs, shift, signed, True)  # fmt: skip
    return dx, dy, dscale, da, db


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
    needs: int = ALL_GRADIENTS,
) -> tuple[torch.Tensor, ...]:
    """(dx [G, B, D], dy [G, N, D], dscale [G], drow_bias [G, B], dcol_bias [G, N]), empty where `needs` does not ask.

    All come in the accumulation type. `g_row` needs `row_lse`, `g_col`
    needs `col_lse`, `g_pos` a `positive_shift` >= 0. Raises as `triton_forward.stats` does. 4N FLOPs fused,
    3N stored (see the module), N = 2 G B N D; besides the outputs O(B + N) memory, stored also CHUNK_BYTES
    and an fp32 dy.
    """
    check(x, y, row_ids, col_ids, pairs, positive_shift, INTERPRETED)
    if (g_row is not None and row_lse is None) or (g_col is not None and col_lse is None):
        raise ValueError("g_row needs row_lse and g_col needs col_lse, got None")
    if g_pos is not None and positive_shift < 0:
        raise ValueError(f"g_pos needs a positive pair: positive_shift must be >= 0, got {positive_shift}")
    acc = accumulate_dtype(x.dtype)
    x, y = x.contiguous(), y.contiguous()
    scale, row_bias, col_bias, g_row, g_col, g_soft, g_pos = (
        as_vector(v, acc) for v in (scale, row_bias, col_bias, g_row, g_col, g_soft, g_pos)
    )
    row_lse, col_lse = (as_vector(v, lse_dtype(x.device)) for v in (row_lse, col_lse))
    row_ids, col_ids = (as_vector(v, torch.int64) if pairs >= 2 else None for v in (row_ids, col_ids))
    signed = soft_signed and g_soft is not None and positive_shift >= 0
    row_lse, col_lse = (None if g is None else v for g, v in ((g_row, row_lse), (g_col, col_lse)))
    if 0 in (*x.shape, y.shape[1]):
        if x.shape[2] == 0 and x.shape[0] * x.shape[1] * y.shape[1]:
            raise ValueError("x and y must have at least one feature, got D = 0")
        shapes = (x.shape, y.shape, scale.shape, x.shape[:2], y.shape[:2])
        wanted = zip(shapes, GRADIENTS, strict=True)
        return tuple(scale.new_zeros(shape if needs & bit else (0,)) for shape, bit in wanted)

    D, tf32 = x.shape[2], precision(x.dtype, INTERPRETED) == "tf32"
    gain = None
    if x.dtype == torch.float16:
        gain = _gain([g for g in (g_row, g_col, g_soft, g_pos) if g is not None], scale)
        g_row, g_col, g_soft, g_pos = (None if g is None else g / gain for g in (g_row, g_col, g_soft, g_pos))
    out_scale = scale if gain is None else scale * gain
    weights, rest = (row_lse, col_lse, g_row, g_col, g_soft, g_pos), (pairs, positive_shift, signed)
    problem = (x, y, scale, out_scale, row_bias, col_bias, row_ids, col_ids)
    with device_guard(x):
        run = stored if tiling(x.dtype, D, tf32, INTERPRETED).BO < D else _fused
        found = run(*problem, *weights, *rest, needs)
    if gain is not None:
        found = (*found[:2], *(None if d is None else d * gain for d in found[2:]))
    bits = zip(found, GRADIENTS, strict=True)
    return tuple(d if d is not None and needs & bit else scale.new_empty(0) for d, bit in bits)
