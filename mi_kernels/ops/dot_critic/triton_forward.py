"""Statistics of the dot critic's scores in Triton; the scores never leave a tile.

    S[i, j]      = scale <x_i, y_j> + a_i + b_j
    row_lse[i]   = log sum_j exp S[i, j]             over allowed j; -inf where there is none
    col_lse[j]   = log sum_i exp S[i, j]             the same kernel with the roles of x and y exchanged
    with S clamped to [-clip, clip] in both where a clip is given; and of the scores as they are
    row_soft[i]  = sum_j softplus(S[i, j])           optionally softplus(-S) on the positive pair

The log-sum-exps are in fp64 (common/dtypes.py says why), everything before their last sum is not.
Per launch 2 G B N D FLOPs. Each program reads its own tile of BM rows and all of the other side, mostly from
L2: G (B D + (B / BM) N D) elements; it writes BM numbers. Row and column log-sum-exps together
take one pass over tiles instead (triton_tiles.py), N in units of N = 2 G B N D. Deterministic.
"""

import math

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype, lse_dtype
from ..common.triton import (
    as_vector,
    device_guard,
    dot_tile,
    load_tile,
    load_vector,
    mma,
    next_power,
    precision,
    softplus,
)
from . import triton_tiles
from .schema import COL_LSE, ROW_LSE, SIGNED, SOFTPLUS
from .triton_common import Tiling, allowed_tile, check, clamp, positive_tile


@triton.jit
def lse_update(b_max, b_sum, b_s):
    """One step of the online log-sum-exp along axis 1; excluded scores are -inf."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)  # -inf - -inf would be NaN
    b_sum = b_sum * tl.exp(b_max - b_ref) + tl.sum(tl.exp(b_s - b_ref[:, None]), 1)
    return b_new, b_sum


@triton.jit(do_not_specialize=["n_own", "n_oth", "shift"])
def stats_kernel(
    p_own, p_oth, p_scale, p_own_bias, p_oth_bias, p_own_ids, p_oth_ids, p_lse, p_soft,
    n_own, n_oth, D, shift,
    PAIRS: tl.constexpr, SOFT_SIGNED: tl.constexpr, SWAP: tl.constexpr, CLIP: tl.constexpr, WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = p_scale.dtype.element_ty
    TERMS: tl.constexpr = 17 if ACC == tl.float64 else 8
    n_tiles = tl.cdiv(n_own, BM)
    i_g = tl.program_id(0).to(tl.int64) // n_tiles
    o_own = (tl.program_id(0) % n_tiles) * BM + tl.arange(0, BM)
    p_own += i_g * n_own * D
    p_oth += i_g * n_oth * D
    b_scale = tl.load(p_scale + i_g)
    b_own_ids = None
    if PAIRS >= 2:
        b_own_ids = load_vector(p_own_ids + i_g * n_own, o_own, n_own, 0)  # [BM]
    if p_own_bias is not None:
        b_own_bias = load_vector(p_own_bias + i_g * n_own, o_own, n_own, 0.0)  # [BM]
    if WHOLE_D:
        o_k = tl.arange(0, BK)
        b_own = load_tile(p_own, o_own, o_k, n_own, D)  # [BM, BK]

    b_max = tl.full([BM], -float("inf"), dtype=ACC)
    b_sum = tl.zeros([BM], dtype=ACC)
    b_soft = tl.zeros([BM], dtype=ACC)
    for i_oth in range(0, n_oth, BN):
        o_oth = i_oth + tl.arange(0, BN)
        if WHOLE_D:
            b_oth = load_tile(p_oth, o_oth, o_k, n_oth, D)  # [BN, BK]
            b_s = mma(b_own, tl.trans(b_oth), None, ACC, PRECISION)  # [BM, BN]
        else:
            b_s = dot_tile(p_own, p_oth, o_own, o_oth, n_own, n_oth, D, ACC, PRECISION, BM, BN, BK)
        b_s = b_s * b_scale
        if p_own_bias is not None:
            b_s += b_own_bias[:, None]
        if p_oth_bias is not None:
            b_s += load_vector(p_oth_bias + i_g * n_oth, o_oth, n_oth, 0.0)[None, :]
        b_oth_ids = None
        if PAIRS >= 2:
            b_oth_ids = load_vector(p_oth_ids + i_g * n_oth, o_oth, n_oth, 0)  # [BN]
        m_pos = None
        if (PAIRS == 3) or SOFT_SIGNED:
            m_pos = positive_tile(o_own, o_oth, n_own, n_oth, shift, SWAP)
        m = allowed_tile(o_own, o_oth, b_own_ids, b_oth_ids, m_pos, n_own, n_oth, PAIRS)
        if p_lse is not None:
            b_c = b_s if CLIP is None else clamp(b_s, CLIP)
            b_max, b_sum = lse_update(b_max, b_sum, tl.where(m, b_c, -float("inf")))
        if p_soft is not None:
            if SOFT_SIGNED:
                b_s = tl.where(m_pos, -b_s, b_s)
            b_soft += tl.sum(tl.where(m, softplus(b_s, TERMS), 0.0), 1)

    o_out = i_g * n_own + o_own
    if p_lse is not None:
        tl.store(p_lse + o_out, b_max.to(tl.float64) + tl.log(b_sum).to(tl.float64), mask=o_own < n_own)
    if p_soft is not None:
        tl.store(p_soft + o_out, b_soft, mask=o_own < n_own)


INTERPRETED = not isinstance(stats_kernel, triton.runtime.JITFunction)


def tiling(dtype: torch.dtype, D: int, tf32: bool, ids: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and feature size, all free of register spills on sm_80 and sm_90; `ids` take registers."""
    if interpreted:
        return Tiling(32, 16, 16, 0, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, 0, 4, 1)
    if dtype == torch.float32:
        # Rows that are not aligned take registers for their loads.
        if tf32:
            return Tiling(64, 64, 32, 0, 8, 1 if D % 16 else 2)
        return Tiling(64, 32, 16, 0, 4, 1 if D % 16 else 2 if ids else 3)
    return Tiling(128, 64, next_power(D, 16) if D <= 128 else 64, 0, 8, 3)


def _launch(
    own, oth, scale, own_bias, oth_bias, own_ids, oth_ids, lse, soft, pairs, shift, signed, clip, swap
) -> None:
    G, n_own, D = own.shape
    input_precision = precision(own.dtype, INTERPRETED)
    t = tiling(own.dtype, D, input_precision == "tf32", pairs >= 2, INTERPRETED)
    stats_kernel[(G * triton.cdiv(n_own, t.BM),)](
        own, oth, scale, own_bias, oth_bias, own_ids, oth_ids, lse, soft,
        n_own, oth.shape[1], D, max(shift, 0),
        PAIRS=pairs, SOFT_SIGNED=signed, SWAP=swap, CLIP=None if clip == math.inf else clip,
        WHOLE_D=t.BK >= D, PRECISION=input_precision,
        BM=t.BM, BN=t.BN, BK=t.BK, num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def stats(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    row_bias: torch.Tensor | None,
    col_bias: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    col_ids: torch.Tensor | None,
    pairs: int,
    positive_shift: int,
    stats: int,
    clip: float = math.inf,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row_lse [G, B], col_lse [G, N], row_softplus [G, B]) in nats; shape [0] where `stats` does not ask.

    x [G, B, D], y [G, N, D], scale [G], biases and ids [G, B] and [G, N] or None. `stats` is a sum of
    ROW_LSE, COL_LSE, SOFTPLUS and SIGNED; each value of `clip` is compiled once. Raises RuntimeError for CPU
    tensors outside of the interpreter, TypeError and ValueError for inputs that do not fit. 2 G B N D FLOPs for the
    log-sum-exps, one side or both, and as many for the softplus sums beside both.
    """
    check(x, y, row_ids, col_ids, pairs, positive_shift, INTERPRETED)
    acc = accumulate_dtype(x.dtype)
    x, y = x.contiguous(), y.contiguous()
    scale, row_bias, col_bias = (as_vector(v, acc) for v in (scale, row_bias, col_bias))
    row_ids, col_ids = (as_vector(v, torch.int64) if pairs >= 2 else None for v in (row_ids, col_ids))
    signed = bool(stats & SIGNED) and positive_shift >= 0

    def output(bit: int, side: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(side.shape[:2] if stats & bit else (0,), dtype=dtype, device=x.device)

    wide = lse_dtype(x.device)
    row_lse, col_lse, row_soft = output(ROW_LSE, x, wide), output(COL_LSE, y, wide), output(SOFTPLUS, x, acc)
    with device_guard(x):
        if row_lse.numel() and col_lse.numel():
            problem = (x, y, scale, row_bias, col_bias, row_ids, col_ids, pairs, positive_shift)
            row_lse, col_lse = triton_tiles.both_sides(problem, clip)
            stats &= SOFTPLUS | SIGNED
        if stats & (ROW_LSE | SOFTPLUS) and row_lse.numel() + row_soft.numel():
            lse = row_lse if stats & ROW_LSE else None
            soft = row_soft if stats & SOFTPLUS else None
            _launch(x, y, scale, row_bias, col_bias, row_ids, col_ids, lse, soft, pairs, positive_shift,
                    signed and soft is not None, clip, False)  # fmt: skip
        if stats & COL_LSE and col_lse.numel():
            _launch(y, x, scale, col_bias, row_bias, col_ids, row_ids, col_lse, None, pairs, positive_shift,
                    False, clip, True)  # fmt: skip
    return row_lse, col_lse, row_soft
