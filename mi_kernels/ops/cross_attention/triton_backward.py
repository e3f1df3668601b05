"""Attention backward in Triton: two launches for all directed pairs of a call; weights are recomputed from the stats.

    dp_ij = m_ij <g_i, v_j>                                           m: dropout's factor, g: the gradient of out
    softmax:   ds_ij = p_ij (dp_ij - delta_i),     delta_i = <g_i, out_i>
    sparsemax: ds_ij = [p_ij > 0] (dp_ij - delta_i), delta_i = the mean of dp_ij over the support
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i m_ij p_ij g_i

Owners compute: no atomics, every output written once, in a fixed order. The first kernel owns queries, walks over keys
and writes dq and delta (sparsemax walks twice: the mean comes first); the second owns keys, walks over the queries that
may read them and writes dk and dv. With P = 2 B heads Tq Tk FLOPs per feature: 2 E + Ev for dq (E + Ev more for
sparsemax), 2 E + 2 Ev for dk and dv, so 3.5 times the forward at E = Ev. Heads wider than a block of features
recompute the scores for each block. A program reads its own rows once and the other side's mostly from L2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import device_guard, mma, next_power, precision
from .triton_common import (
    GRAD,
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
    with_rows,
)


@triton.jit
def load_stat(p, o_n, n, SPARSE: tl.constexpr):
    """Statistics in the units of the scores; a row beyond the end gets no weight."""
    return tl.load(p + o_n, mask=o_n < n, other=float("inf")) * unit(SPARSE)


@triton.jit
def weight_tile(b_own, b_oth, own, oth, o_own, o_oth, o_i, o_j, b_stat, end_k, E, offset, b_scale, SPARSE: tl.constexpr,
                ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BE: tl.constexpr):  # fmt: skip
    """p of one tile [BM, BN], whichever side owns it; o_i, o_j and b_stat broadcast."""
    b_s = products(b_own, b_oth, own, oth, o_own, o_oth, E, ACC, PRECISION, BM, BN, BE) * b_scale
    return weights(b_s, b_stat, (o_j < end_k) & (o_j - o_i <= offset), SPARSE)


@triton.jit
def dscores(b_p, b_dp, b_delta, SPARSE: tl.constexpr):
    if SPARSE:
        return tl.where(b_p > 0.0, b_dp - b_delta, 0.0)
    else:
        return b_p * (b_dp - b_delta)


@triton.jit
def row_delta(p_out, o_row, grads, o_i, EV, ACC: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr):
    """<g_i, out_i>: [BM]."""
    b_delta = tl.zeros([BM], dtype=ACC)
    for i_v in range(0, EV, BV):
        o_v = i_v + tl.arange(0, BV)
        b_g = load_rows(grads, o_i, o_v, EV).to(ACC)  # [BM, BV]
        mask = (o_i < grads[2])[:, None] & (o_v < EV)[None, :]
        b_o = tl.load(p_out + o_row[:, None] * EV + o_v[None, :], mask=mask, other=0.0).to(ACC)
        b_delta += tl.sum(b_g * b_o, 1)
    return b_delta


@triton.jit
def query_kernel(
    p_query, p_key, p_value, p_grad, p_query_lengths, p_key_lengths, p_out, p_stat, p_delta, p_dquery, p_seed,
    sizes, numbers, E, EV,
    SPARSE: tl.constexpr, DROPS: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = p_stat[0].dtype.element_ty
    i_pair, i_local = pair_of(sizes, tl.program_id(0), N)
    n_q, n_k, n_heads = size(sizes, i_pair, TQ, N), size(sizes, i_pair, TK, N), size(sizes, i_pair, HEADS, N)
    offset = size(sizes, i_pair, OFFSET, N) - n_q
    n_blocks = tl.cdiv(E, BE)
    n_tiles = tl.cdiv(n_q, BM)
    i_bh = i_local // (n_tiles * n_blocks)
    i_0 = (i_local // n_blocks % n_tiles) * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), (i_bh % n_heads).to(tl.int64)
    end_q = length(pick(p_query_lengths, i_pair, 0, N), size(sizes, i_pair, QUERY_LENGTHS, N), i_b, n_q)
    end_k = length(pick(p_key_lengths, i_pair, 0, N), size(sizes, i_pair, KEY_LENGTHS, N), i_b, n_k)
    queries = side(pick(p_query, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_q, QUERY, ALIGN, N)
    keys = side(pick(p_key, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_k, KEY, ALIGN, N)
    values = side(pick(p_value, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_k, VALUE, ALIGN, N)
    grads = side(pick(p_grad, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_q, GRAD, ALIGN, N)
    b_scale = number(numbers, i_pair, SCALE, ACC, N)
    o_i = i_0 + tl.arange(0, BM)
    o_e = (i_local % n_blocks) * BE + tl.arange(0, BE)
    o_row = i_bh.to(tl.int64) * n_q + o_i
    last = tl.minimum(i_0 + BM, end_q) - 1
    n_end = tl.where(i_0 < end_q, tl.maximum(tl.minimum(end_k, last + offset + 1), 0), 0)
    b_stat = load_stat(pick(p_stat, i_pair, 0, N) + i_bh.to(tl.int64) * n_q, o_i, end_q, SPARSE)[:, None]
    b_q, b_g = None, None
    if WHOLE:
        b_q = load_rows(queries, o_i, o_e, E)  # [BM, BE]
        b_g = load_rows(grads, o_i, tl.arange(0, BV), EV)  # [BM, BV]
    b_r1, b_r2, drop_below, b_keep = None, None, None, None
    if DROPS:
        b_r1, b_r2 = row_keys(head_key(p_seed, i_pair, i_bh), o_i[:, None])  # [BM, 1]
        drop_below, b_keep = drop_bound(sizes, i_pair, N), number(numbers, i_pair, KEEP, ACC, N)

    if SPARSE:
        b_sum = tl.zeros([BM], dtype=ACC)
        b_n = tl.zeros([BM], dtype=ACC)
        for i_j in range(0, n_end, BN):
            o_j = i_j + tl.arange(0, BN)
            b_k = load_rows(keys, o_j, o_e, E) if WHOLE else None  # [BN, BE]
            b_v = load_rows(values, o_j, tl.arange(0, BV), EV) if WHOLE else None  # [BN, BV]
            b_p = weight_tile(b_q, b_k, queries, keys, o_i, o_j, o_i[:, None], o_j[None, :], b_stat, end_k, E, offset,
                              b_scale * unit(SPARSE), SPARSE, ACC, PRECISION, BM, BN, BE)  # fmt: skip
            b_dp = products(b_g, b_v, grads, values, o_i, o_j, EV, ACC, PRECISION, BM, BN, BV)  # [BM, BN]
            if DROPS:
                b_dp = tl.where(kept(b_r1, b_r2, o_j[None, :], drop_below), b_dp * b_keep, 0.0)
            b_sum += tl.sum(tl.where(b_p > 0.0, b_dp, 0.0), 1)
            b_n += tl.sum((b_p > 0.0).to(ACC), 1)
        b_delta = b_sum / tl.maximum(b_n, 1.0)
    else:
        b_delta = row_delta(pick(p_out, i_pair, 0, N), o_row, grads, o_i, EV, ACC, BM, BV)

    b_dq = tl.zeros([BM, BE], dtype=ACC)
    for i_j in range(0, n_end, BN):
        o_j = i_j + tl.arange(0, BN)
        b_kd = load_rows(keys, o_j, o_e, E)  # [BN, BE]
        b_kw = b_kd if WHOLE else None
        b_vw = load_rows(values, o_j, tl.arange(0, BV), EV) if WHOLE else None  # [BN, BV]
        b_p = weight_tile(b_q, b_kw, queries, keys, o_i, o_j, o_i[:, None], o_j[None, :], b_stat, end_k, E, offset,
                          b_scale * unit(SPARSE), SPARSE, ACC, PRECISION, BM, BN, BE)  # fmt: skip
        b_dp = products(b_g, b_vw, grads, values, o_i, o_j, EV, ACC, PRECISION, BM, BN, BV)  # [BM, BN]
        if DROPS:
            b_dp = tl.where(kept(b_r1, b_r2, o_j[None, :], drop_below), b_dp * b_keep, 0.0)
        b_ds = dscores(b_p, b_dp, b_delta[:, None], SPARSE)
        b_dq = mma(rounded(b_ds, b_kd.dtype, PRECISION), b_kd, b_dq, ACC, PRECISION)

    m_row = o_i < n_q
    p_dq = pick(p_dquery, i_pair, 0, N)
    tl.store(p_dq + o_row[:, None] * E + o_e[None, :], rounded(b_dq * b_scale, p_dq.dtype.element_ty, PRECISION),
             mask=m_row[:, None] & (o_e < E)[None, :])  # fmt: skip
    if i_local % n_blocks == 0:
        tl.store(pick(p_delta, i_pair, 0, N) + o_row, b_delta, mask=m_row)


@triton.jit
def key_kernel(
    p_query, p_key, p_value, p_grad, p_query_lengths, p_key_lengths, p_stat, p_delta, p_dkey, p_dvalue, p_seed,
    sizes, numbers, E, EV,
    SPARSE: tl.constexpr, DROPS: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = p_stat[0].dtype.element_ty
    i_pair, i_local = pair_of(sizes, tl.program_id(0), N)
    n_q, n_k, n_heads = size(sizes, i_pair, TQ, N), size(sizes, i_pair, TK, N), size(sizes, i_pair, HEADS, N)
    offset = size(sizes, i_pair, OFFSET, N) - n_q
    n_blocks = tl.maximum(tl.cdiv(E, BE), tl.cdiv(EV, BV))
    n_tiles = tl.cdiv(n_k, BN)
    i_bh = i_local // (n_tiles * n_blocks)
    i_0 = (i_local // n_blocks % n_tiles) * BN
    i_b, i_h = (i_bh // n_heads).to(tl.int64), (i_bh % n_heads).to(tl.int64)
    end_q = length(pick(p_query_lengths, i_pair, 0, N), size(sizes, i_pair, QUERY_LENGTHS, N), i_b, n_q)
    end_k = length(pick(p_key_lengths, i_pair, 0, N), size(sizes, i_pair, KEY_LENGTHS, N), i_b, n_k)
    queries = side(pick(p_query, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_q, QUERY, ALIGN, N)
    keys = side(pick(p_key, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_k, KEY, ALIGN, N)
    values = side(pick(p_value, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_k, VALUE, ALIGN, N)
    grads = side(pick(p_grad, i_pair, 0, N), sizes, i_pair, i_b, i_h, end_q, GRAD, ALIGN, N)
    b_scale = number(numbers, i_pair, SCALE, ACC, N)
    o_j = i_0 + tl.arange(0, BN)
    o_e = (i_local % n_blocks) * BE + tl.arange(0, BE)
    o_v = (i_local % n_blocks) * BV + tl.arange(0, BV)
    p_stat_row = pick(p_stat, i_pair, 0, N) + i_bh.to(tl.int64) * n_q
    p_delta_row = pick(p_delta, i_pair, 0, N) + i_bh.to(tl.int64) * n_q
    # The first query that may read any key of this tile, rounded down to a tile of queries.
    first = tl.maximum(i_0 - offset, 0) // BM * BM
    n_end = tl.where(i_0 < end_k, end_q, 0)
    b_k, b_v = None, None
    if WHOLE:
        b_k = load_rows(keys, o_j, o_e, E)  # [BN, BE]
        b_v = load_rows(values, o_j, o_v, EV)  # [BN, BV]
    head, drop_below, b_keep = None, None, None
    if DROPS:
        head, drop_below = head_key(p_seed, i_pair, i_bh), drop_bound(sizes, i_pair, N)
        b_keep = number(numbers, i_pair, KEEP, ACC, N)

    b_dk = tl.zeros([BN, BE], dtype=ACC)
    b_dv = tl.zeros([BN, BV], dtype=ACC)
    for i_i in range(first, n_end, BM):
        o_i = i_i + tl.arange(0, BM)
        b_qd = load_rows(queries, o_i, o_e, E)  # [BM, BE]
        b_gd = load_rows(grads, o_i, o_v, EV)  # [BM, BV]
        b_q = b_qd if WHOLE else None
        b_g = b_gd if WHOLE else None
        b_stat = load_stat(p_stat_row, o_i, end_q, SPARSE)[None, :]
        b_delta = tl.load(p_delta_row + o_i, mask=o_i < end_q, other=0.0)[None, :]
        b_p = weight_tile(b_k, b_q, keys, queries, o_j, o_i, o_i[None, :], o_j[:, None], b_stat, end_k, E, offset,
                          b_scale * unit(SPARSE), SPARSE, ACC, PRECISION, BN, BM, BE)  # fmt: skip
        b_dp = products(b_v, b_g, values, grads, o_j, o_i, EV, ACC, PRECISION, BN, BM, BV)  # [BN, BM]
        b_ds = dscores(b_p, b_dp, b_delta, SPARSE)
        if DROPS:
            b_r1, b_r2 = row_keys(head, o_i[None, :])  # [1, BM]
            m_kept = kept(b_r1, b_r2, o_j[:, None], drop_below)
            b_ds = dscores(b_p, tl.where(m_kept, b_dp * b_keep, 0.0), b_delta, SPARSE)
            b_p = tl.where(m_kept, b_p * b_keep, 0.0)
        b_dv = mma(rounded(b_p, b_gd.dtype, PRECISION), b_gd, b_dv, ACC, PRECISION)
        b_dk = mma(rounded(b_ds, b_qd.dtype, PRECISION), b_qd, b_dk, ACC, PRECISION)

    o_row = i_bh.to(tl.int64) * n_k + o_j
    m_row = (o_j < n_k)[:, None]
    p_dk, p_dv = pick(p_dkey, i_pair, 0, N), pick(p_dvalue, i_pair, 0, N)
    tl.store(p_dk + o_row[:, None] * E + o_e[None, :], rounded(b_dk * b_scale, p_dk.dtype.element_ty, PRECISION),
             mask=m_row & (o_e < E)[None, :])  # fmt: skip
    tl.store(p_dv + o_row[:, None] * EV + o_v[None, :], rounded(b_dv, p_dv.dtype.element_ty, PRECISION),
             mask=m_row & (o_v < EV)[None, :])  # fmt: skip


def query_tiling(dtype: torch.dtype, E: int, EV: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and head sizes, all free of register spills on sm_80 and sm_90."""
    if interpreted:
        return Tiling(32, 32, 16, 16, 4, 1)
    if dtype == torch.float64:
        return Tiling(32, 32, 16, 16, 4, 1)
    if dtype == torch.float32 and not tf32:
        return Tiling(32, 16 if max(E, EV) > 32 else 32, next_power(min(E, 32), 16), next_power(min(EV, 32), 16), 4, 1)
    widest = 64 if dtype == torch.float32 else 128
    BE, BV = next_power(min(E, widest), 16), next_power(min(EV, widest), 16)
    if max(BE, BV) > 32:
        return Tiling(64, 32, BE, BV, 8 if max(BE, BV) > widest // 2 else 4, 1)
    return Tiling(64, 64, BE, BV, 4, 1)


def key_tiling(dtype: torch.dtype, E: int, EV: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """As `query_tiling`, the owner's tile now the keys'. Two sums of BN rows stay in registers."""
    t = query_tiling(dtype, E, EV, tf32, interpreted)
    if dtype == torch.float64 and not interpreted:
        return t._replace(BM=16)
    return t._replace(BM=t.BN, BN=t.BM)


def _launch(
    pairs: Pairs,
    grad_out: Sequence[Tensor],
    out: Sequence[Tensor],
    stat: Sequence[Tensor],
    gradients: tuple[list[Tensor], list[Tensor], list[Tensor]],
    seed: Tensor,
    sparse: bool,
) -> None:
    (E, EV), dtype, n = pairs.head_sizes, pairs.query[0].dtype, len(pairs.places)
    dq, dk, dv = (tuple(side[i] for i in pairs.places) for side in gradients)
    input_precision = precision(dtype, INTERPRETED)
    grads = tuple(with_rows(grad_out[i]) for i in pairs.places)
    outs, stats = (tuple(t[i].contiguous() for i in pairs.places) for t in (out, stat))
    deltas = tuple(torch.empty_like(s) for s in stats)
    align = alignment((*pairs.query, *pairs.key, *pairs.value, *grads))
    inputs = (pairs.query, pairs.key, pairs.value, grads, pairs.query_lengths, pairs.key_lengths)

    def constants(t: Tiling) -> dict:
        return {
            "SPARSE": sparse, "DROPS": pairs.drops, "N": n, "ALIGN": align, "WHOLE": t.whole(E, EV),
            "PRECISION": input_precision, "BM": t.BM, "BN": t.BN, "BE": t.BE, "BV": t.BV,
            "num_warps": t.num_warps, "num_stages": t.num_stages, "enable_fp_fusion": True,
            "maxnreg": MOST_REGISTERS,
        }  # fmt: skip

    heads = [q.shape[0] * q.shape[1] for q in pairs.query]
    shape = (dtype, E, EV, input_precision == "tf32", INTERPRETED)
    t = query_tiling(*shape)
    blocks = triton.cdiv(E, t.BE)
    starts, programs = pairs.starts(
        h * triton.cdiv(q.shape[2], t.BM) * blocks for h, q in zip(heads, pairs.query, strict=True)
    )
    query_kernel[(programs,)](*inputs, outs, stats, deltas, dq, seed, pairs.sizes(starts, align, grads),
                              pairs.numbers(), E, EV, **constants(t))  # fmt: skip
    t = key_tiling(*shape)
    blocks = max(triton.cdiv(E, t.BE), triton.cdiv(EV, t.BV))
    starts, programs = pairs.starts(
        h * triton.cdiv(k.shape[2], t.BN) * blocks for h, k in zip(heads, pairs.key, strict=True)
    )
    key_kernel[(programs,)](*inputs, stats, deltas, dk, dv, seed, pairs.sizes(starts, align, grads),
                            pairs.numbers(), E, EV, **constants(t))  # fmt: skip


def backward(
    grad_out: Sequence[Tensor],
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    out: Sequence[Tensor],
    stat: Sequence[Tensor],
    query_lengths: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    causal_offset: Sequence[int],
    scale: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor,
    sparse: bool,
) -> list[Tensor]:
    """All dq, all dk, all dv, contiguous, in the dtype of the inputs: two launches for every up to 16 pairs whose head
    sizes are alike. Raises as `triton_forward.forward` does and costs as the module says; besides the outputs it takes
    one number per query."""
    new = lambda ts: [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in ts]  # noqa: E731
    gradients = (new(query), new(key), new(value))
    with device_guard(query[0]):
        for pairs in grouped(query, key, value, query_lengths, key_lengths, causal_offset, scale, dropout_p):
            _launch(pairs, grad_out, out, stat, gradients, seeds_of(pairs, seed), sparse)
    return [t for side in gradients for t in side]
