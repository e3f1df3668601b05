"""Attention forward in Triton: all directed pairs of a call in one launch, no weight ever stored.

    s_ij = scale <q_i, k_j>    over keys j < key length, j - i <= causal offset
    softmax:   out_i = sum_j exp(s_ij - lse_i) v_j, by the online log-sum-exp, one pass over the keys
    sparsemax: out_i = sum_j max(s_ij - tau_i, 0) v_j with sum_j max(s_ij - tau_i, 0) = 1

Sparsemax finds tau without sorting. f(tau) = sum_j max(s_j - tau, 0) - 1 is convex and falling, so Newton's step
tau + f(tau) / #{s_j > tau} from below never passes the root. A first pass over the keys gives a bound from below: the
largest tau of a tile's own keys, themselves by two steps. Each further pass takes a step on all keys, until no score
lies between a row's tau and its step: then the step was taken on the right support and is the exact root. A pass that
is not the last drops a key from some support, so passes end; three to five are usual.

2 B heads Tq Tk (E + Ev) FLOPs for softmax, and 2 B heads Tq Tk E for each pass of sparsemax beyond one; values wider
than a block of BV columns repeat the scores per block. A program reads its BM queries once and all allowed keys and
values, mostly from L2; it writes BM rows of out and one statistic per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, mma, next_power, precision
from .triton_common import (
    HEADS,
    INTERPRETED,
    KEEP,
    KEY,
    KEY_LENGTHS,
    MOST_REGISTERS,
    OFFSET,
    QUERY,
    QUERY_LENGTHS,
    SCALE,
    TK,
    TQ,
    VALUE,
    Pairs,
    Tiling,
    alignment,
    drop_bound,
    grouped,
    head_key,
    kept,
    length,
    load_rows,
    number,
    pair_of,
    pick,
    products,
    rounded,
    row_keys,
    seeds_of,
    side,
    size,
    unit,
    weights,
)


@triton.jit
def masked_scores(b_q, queries, keys, o_i, o_j, E, offset, b_scale, ACC: tl.constexpr, PRECISION: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """Scores of one tile, -inf where a key is not allowed: [BM, BN]."""
    b_k = None
    if b_q is not None:
        b_k = load_rows(keys, o_j, tl.arange(0, BE), E)  # [BN, BE]
    b_s = products(b_q, b_k, queries, keys, o_i, o_j, E, ACC, PRECISION, BM, BN, BE) * b_scale
    m = (o_j < keys[2])[None, :] & (o_j[None, :] - o_i[:, None] <= offset)
    return tl.where(m, b_s, -float("inf"))


@triton.jit
def newton(b_s, b_tau):
    """Sum of what exceeds tau in each row, how many do, and the least of them; nothing exceeds a tau of -inf."""
    b_over = b_s - tl.where(b_tau == -float("inf"), float("inf"), b_tau)[:, None]
    m = b_over > 0.0
    b_least = tl.min(tl.where(m, b_s, float("inf")), 1)
    return tl.sum(tl.where(m, b_over, 0.0), 1), tl.sum(m.to(b_s.dtype), 1), b_least


@triton.jit
def below(b_top):
    """A number just below each, in the precision of the scores. Only for scores far from 0."""
    if b_top.dtype == tl.float64:
        return b_top - tl.abs(b_top) * 2.3e-16
    else:
        return b_top - tl.abs(b_top) * 1.2e-7


@triton.jit
def threshold(b_q, queries, keys, o_i, n_end, E, offset, b_scale, ACC: tl.constexpr, PRECISION: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """Sparsemax's tau of each row, -inf without an allowed key: [BM]."""
    b_tau = tl.full([BM], -float("inf"), dtype=ACC)
    b_top = tl.full([BM], -float("inf"), dtype=ACC)
    for i_j in range(0, n_end, BN):
        o_j = i_j + tl.arange(0, BN)
        b_s = masked_scores(b_q, queries, keys, o_i, o_j, E, offset, b_scale, ACC, PRECISION, BM, BN, BE)
        b_top = tl.maximum(b_top, tl.max(b_s, 1))
        b_tau = tl.maximum(b_tau, tl.max(b_s, 1) - 1.0)
        for _ in tl.static_range(2):
            b_sum, b_n, _least = newton(b_s, b_tau)
            b_tau = tl.where(b_n > 0.0, tl.maximum(b_tau, b_tau + (b_sum - 1.0) / tl.maximum(b_n, 1.0)), b_tau)
    # At large scores tau may be rounded up to the maximum: take the next smaller number, or the support would be empty.
    b_low_top = below(b_top)
    b_tau = tl.where(b_tau >= b_top, b_low_top, b_tau)
    unsettled = n_end > 0
    while unsettled:
        b_sum = tl.zeros([BM], dtype=ACC)
        b_n = tl.zeros([BM], dtype=ACC)
        b_least = tl.full([BM], float("inf"), dtype=ACC)
        for i_j in range(0, n_end, BN):
            o_j = i_j + tl.arange(0, BN)
            b_s = masked_scores(b_q, queries, keys, o_i, o_j, E, offset, b_scale, ACC, PRECISION, BM, BN, BE)
            b_over, b_count, b_low = newton(b_s, b_tau)
            b_sum += b_over
            b_n += b_count
            b_least = tl.minimum(b_least, b_low)
        b_tau = tl.where(b_n > 0.0, b_tau + (b_sum - 1.0) / tl.maximum(b_n, 1.0), b_tau)
        b_tau = tl.where(b_tau >= b_top, b_low_top, b_tau)
        unsettled = tl.max((b_tau >= b_least).to(tl.int32), 0) > 0
    return b_tau


@triton.jit
def forward_kernel(
    p_query, p_key, p_value, p_query_lengths, p_key_lengths, p_out, p_stat, p_seed, sizes, numbers, E, EV,
    SPARSE: tl.constexpr, DROPS: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = p_stat[0].dtype.element_ty
    i_pair, i_local = pair_of(sizes, tl.program_id(0), N)
    n_q, n_k, n_heads = size(sizes, i_pair, TQ, N), size(sizes, i_pair, TK, N), size(sizes, i_pair, HEADS, N)
    offset = size(sizes, i_pair, OFFSET, N) - n_q
    n_blocks = tl.cdiv(EV, BV)
    n_tiles = tl.cdiv(n_q, BM)
    i_bh = i_local // (n_tiles * n_blocks)
    i_0 = (i_local // n_blocks % n_tiles) * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), (i_bh % n_heads).to(tl.int64)
    end_q = length(pick(p_query_lengths, i_pair, 0, N), size(sizes, i_pair, QUERY_LENGTHS, N), i_b, n_q)
    end_k = length(pick(p_key_lengths, i_pair, 0, N), size(sizes, i_pair, KEY_LENGTHS, N), i_b, n_k)
    queries = side(pick(p_query, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_q, QUERY, ALIGN, N)
    keys = side(pick(p_key, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_k, KEY, ALIGN, N)
    values = side(pick(p_value, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_k, VALUE, ALIGN, N)
    b_scale = number(numbers, i_pair, SCALE, ACC, N) * unit(SPARSE)
    o_i = i_0 + tl.arange(0, BM)
    o_v = (i_local % n_blocks) * BV + tl.arange(0, BV)
    last = tl.minimum(i_0 + BM, end_q) - 1
    n_end = tl.where(i_0 < end_q, tl.maximum(tl.minimum(end_k, last + offset + 1), 0), 0)
    b_q = None
    if WHOLE:
        b_q = load_rows(queries, o_i, tl.arange(0, BE), E)  # [BM, BE]
    b_r1, b_r2, drop_below = None, None, None
    if DROPS:
        b_r1, b_r2 = row_keys(head_key(p_seed, i_pair, i_bh), o_i[:, None])  # [BM, 1]
        drop_below = drop_bound(sizes, i_pair, N)

    b_out = tl.zeros([BM, BV], dtype=ACC)
    b_max = tl.full([BM], -float("inf"), dtype=ACC)
    b_sum = tl.zeros([BM], dtype=ACC)
    if SPARSE:
        b_max = threshold(b_q, queries, keys, o_i, n_end, E, offset, b_scale, ACC, PRECISION, BM, BN, BE)
    for i_j in range(0, n_end, BN):
        o_j = i_j + tl.arange(0, BN)
        b_s = masked_scores(b_q, queries, keys, o_i, o_j, E, offset, b_scale, ACC, PRECISION, BM, BN, BE)
        if SPARSE:
            b_p = weights(b_s, b_max[:, None], b_s != -float("inf"), SPARSE)  # [BM, BN]
            b_sum += tl.sum(b_p, 1)  # 1 but for rounding
        else:
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)  # -inf - -inf would be NaN
            b_shrink = tl.exp2(b_max - b_ref)
            b_p = tl.exp2(b_s - b_ref[:, None])
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            b_out = b_out * b_shrink[:, None]
            b_max = b_new
        if DROPS:
            b_p = tl.where(kept(b_r1, b_r2, o_j[None, :], drop_below), b_p, 0.0)
        b_v = load_rows(values, o_j, o_v, EV)  # [BN, BV]
        b_out = mma(rounded(b_p, b_v.dtype, PRECISION), b_v, b_out, ACC, PRECISION)

    seen = (o_i < end_q) & (tl.minimum(end_k, o_i + offset + 1) > 0)  # rows that see a key, even one whose score is NaN
    alive = seen & (b_max > -float("inf"))
    b_out = b_out / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    if not SPARSE:
        b_max = (b_max + tl.log2(tl.where(b_sum > 0.0, b_sum, 1.0))) / unit(SPARSE)
    if DROPS:
        b_out = b_out * number(numbers, i_pair, KEEP, ACC, N)
    o_row = i_bh.to(tl.int64) * n_q + o_i
    m_row = o_i < n_q
    p_o = pick(p_out, i_pair, 0, N)
    b_out = rounded(tl.where(seen[:, None], b_out, 0.0), p_o.dtype.element_ty, PRECISION)
    tl.store(p_o + o_row[:, None] * EV + o_v[None, :], b_out, mask=m_row[:, None] & (o_v < EV)[None, :])
    if i_local % n_blocks == 0:
        tl.store(pick(p_stat, i_pair, 0, N) + o_row, tl.where(alive, b_max, float("inf")), mask=m_row)


def tiling(dtype: torch.dtype, E: int, EV: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and head sizes, all free of register spills on sm_80 and sm_90."""
    if interpreted:
        return Tiling(32, 32, 16, 16, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, next_power(min(EV, 32), 16), 4, 1)
    if dtype == torch.float32 and not tf32:
        wide = max(E, EV) > 32
        return Tiling(32, 32, 16 if wide else next_power(E, 16), next_power(min(EV, 64), 16), 4, 2)
    if dtype == torch.float32:
        wide = max(E, EV) > 64
        return Tiling(64, 32, 32 if wide else next_power(E, 16), next_power(min(EV, 64), 16), 4, 2)
    if max(E, EV) > 128:
        return Tiling(64, 64, 64, 128, 8, 2)
    return Tiling(64, 64, next_power(E, 16), next_power(EV, 16), 4, 2)


def _launch(pairs: Pairs, outs: list[Tensor], stats: list[Tensor], seed: Tensor, sparse: bool) -> None:
    (E, EV), dtype = pairs.head_sizes, pairs.query[0].dtype
    input_precision = precision(dtype, INTERPRETED)
    t = tiling(dtype, E, EV, input_precision == "tf32", INTERPRETED)
    blocks = triton.cdiv(EV, t.BV)
    starts, programs = pairs.starts(
        q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], t.BM) * blocks for q in pairs.query
    )
    align = alignment((*pairs.query, *pairs.key, *pairs.value))
    forward_kernel[(programs,)](
        pairs.query, pairs.key, pairs.value, pairs.query_lengths, pairs.key_lengths, tuple(outs), tuple(stats), seed,
        pairs.sizes(starts, align), pairs.numbers(), E, EV,
        SPARSE=sparse, DROPS=pairs.drops, N=len(pairs.places), ALIGN=align, WHOLE=t.whole(E, 0),
        PRECISION=input_precision, BM=t.BM, BN=t.BN, BE=t.BE, BV=t.BV,
        num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True, maxnreg=MOST_REGISTERS,
    )  # fmt: skip


def forward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    query_lengths: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    causal_offset: Sequence[int],
    scale: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor,
    sparse: bool,
) -> list[Tensor]:
    """The outs and then the stats of schema.py, contiguous, in one launch for every up to 16 pairs whose head sizes are
    alike. Inputs are read through their strides while features are next to each other. Raises RuntimeError for CPU
    tensors outside of the interpreter and ValueError for lengths beyond 2^28. Costs as the module says.
    """
    outs = [torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
            for q, v in zip(query, value, strict=True)]  # fmt: skip
    stats = [torch.empty(q.shape[:3], dtype=accumulate_dtype(q.dtype), device=q.device) for q in query]
    with device_guard(query[0]):
        for pairs in grouped(query, key, value, query_lengths, key_lengths, causal_offset, scale, dropout_p):
            of_pairs = [outs[i] for i in pairs.places], [stats[i] for i in pairs.places]
            _launch(pairs, *of_pairs, seeds_of(pairs, seed), sparse)
    return outs + stats
