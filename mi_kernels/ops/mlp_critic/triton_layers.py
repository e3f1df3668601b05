"""The layer products of the MLP critic's backward in Triton; triton_backward.py has the mathematics and the schedule.

Each kernel runs on a chunk of pairs, given g and either the bits of the second layer (m) or its gradient D. FLOPs in
M = 2 G B N H1 H2 over all chunks: `first_layer_kernel` M, `product_kernel` M, `second_layer_kernel` O(G B N H2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import load_tile, load_vector, mma
from .triton_common import (
    INTERPRETED,
    Critic,
    Tiling,
    activate,
    block,
    hidden_tile,
    load_bits,
    load_bits_transposed,
    mode,
    operand,
    slope,
    splits,
)

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit(do_not_specialize=["n_rows", "n_cols", "own", "n_split"])
def second_layer_kernel(
    p_g, p_bits, p_z, p_w, p_bias_part, p_w_part,
    n_rows, n_cols, pitch, H2, own, n_split,
    ACT: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With bits, s by parts. Otherwise D in place of z, and db2 and dw by parts [G, n_split, H2]."""
    ACC: tl.constexpr = p_g.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    n_blocks = tl.cdiv(H2, BK)
    i_g = pid // (n_blocks * n_split)
    i_split = (pid // n_blocks) % n_split
    i_k = (pid % n_blocks * BK).to(tl.int32)
    o_k = i_k + tl.arange(0, BK)
    n_pairs = n_rows * n_cols
    n_part = tl.cdiv(tl.cdiv(n_pairs, n_split), BP) * BP
    start = i_split.to(tl.int32) * n_part
    p_g += i_g * n_pairs
    b_bias = tl.zeros([BK], dtype=ACC)
    b_dw = tl.zeros([BK], dtype=ACC)
    for i_p in range(start, tl.minimum(start + n_part, n_pairs), BP):
        o_p = i_p + tl.arange(0, BP)
        b_g = tl.load(p_g + o_p, mask=o_p < n_pairs, other=0.0)  # [BP]
        if p_bits is not None:
            n_words = tl.cdiv(H2, 32)
            b_m = load_bits(p_bits + i_g * n_rows * n_words * pitch, o_p // n_cols, o_p % n_cols, o_p < n_pairs, i_k,
                            n_words, pitch, ACT, ACC, BP, BK)  # fmt: skip
            b_bias += tl.sum(b_m * b_g[:, None], 0)
        else:
            p = p_z + (i_g * n_pairs + o_p)[:, None] * H2 + o_k[None, :]
            m = (o_p < n_pairs)[:, None] & (o_k < H2)[None, :]
            b_z = tl.load(p, mask=m, other=0.0).to(ACC)  # [BP, BK]
            b_w = load_vector(p_w + i_g * own * H2, o_k, H2, 0.0).to(ACC)
            b_d = b_g[:, None] * b_w[None, :] * slope(b_z, ACT)
            tl.store(p, b_d.to(p_z.dtype.element_ty), mask=m)
            b_bias += tl.sum(b_d, 0)
            b_dw += tl.sum(b_g[:, None] * activate(b_z, ACT), 0)
    o_out = (i_g * n_split + i_split) * H2 + o_k
    tl.store(p_bias_part + o_out, b_bias, mask=o_k < H2)
    if p_bits is None:
        tl.store(p_w_part + o_out, b_dw, mask=o_k < H2)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "own", "n_split"])
def first_layer_kernel(
    p_u, p_v, p_w2, p_w, p_g, p_bits, p_d, p_du, p_dv, p_dw,
    n_rows, n_cols, pitch, H1, H2, own, n_split,
    ACT: tl.constexpr, LAYERS: tl.constexpr, PRECISION: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """du by column tiles [G, column tiles, R, H1]; dv [G, n_split, C, H1] and, with one hidden layer, dw [G, n_split,
    column tiles, H1] by parts of the rows. `p_w2` is diag(w) W2 where there are bits. LAYERS: hidden layers; 0 where
    p_d is dh1 already."""
    ACC: tl.constexpr = p_g.dtype.element_ty
    P: tl.constexpr = BI * BJ
    n_col_tiles = tl.cdiv(n_cols, BJ)
    n_blocks = tl.cdiv(H1, BN)
    pid = tl.program_id(0).to(tl.int64)
    i_col = pid % n_col_tiles
    o_l = ((pid // n_col_tiles) % n_blocks * BN).to(tl.int32) + tl.arange(0, BN)
    i_split = (pid // (n_col_tiles * n_blocks)) % n_split
    i_g = pid // (n_col_tiles * n_blocks * n_split)
    c0 = (i_col * BJ).to(tl.int32)
    o_j = c0 + tl.arange(0, BJ)
    o_pj = c0 + tl.arange(0, P) % BJ
    n_part = tl.cdiv(tl.cdiv(n_rows, n_split), BI) * BI
    start = i_split.to(tl.int32) * n_part
    n_words = tl.cdiv(H2, 32)
    p_u += i_g * n_rows * H1
    p_v += i_g * n_cols * H1
    m_l = o_l < H1
    b_dv = tl.zeros([BJ, BN], dtype=ACC)
    b_dw = tl.zeros([BN], dtype=ACC)
    for r0 in range(start, tl.minimum(start + n_part, n_rows), BI):
        o_i = r0 + tl.arange(0, BI)
        o_pi = r0 + tl.arange(0, P) // BJ
        m_pair = (o_pi < n_rows) & (o_pj < n_cols)
        if LAYERS == 2:
            b_dh = tl.zeros([P, BN], dtype=ACC)
            for i_k in range(0, H2, BK):
                o_k = i_k + tl.arange(0, BK)
                if p_bits is not None:
                    b_d = load_bits(p_bits + i_g * n_rows * n_words * pitch, o_pi, o_pj, m_pair, i_k, n_words, pitch,
                                    ACT, p_w2.dtype.element_ty, P, BK)  # fmt: skip
                else:
                    p = p_d + ((i_g * n_rows + o_pi) * n_cols + o_pj)[:, None] * H2 + o_k[None, :]
                    b_d = tl.load(p, mask=m_pair[:, None] & (o_k < H2)[None, :], other=0.0)  # [P, BK]
                b_w2 = load_tile(p_w2 + i_g * own * H2 * H1, o_k, o_l, H2, H1)  # [BK, BN]
                b_dh = mma(b_d, b_w2, b_dh, ACC, PRECISION)
        elif LAYERS == 0:
            p = p_d + ((i_g * n_rows + o_pi) * n_cols + o_pj)[:, None] * H1 + o_l[None, :]
            b_dh = tl.load(p, mask=m_pair[:, None] & m_l[None, :], other=0.0).to(ACC)  # [P, BN]
        else:
            b_dh = load_vector(p_w + i_g * own * H1, o_l, H1, 0.0).to(ACC)[None, :]
        b_z = hidden_tile(p_u, p_v, o_i, o_j, o_l, n_rows, n_cols, H1, ACC, BI, BJ, BN)  # [P, BN]
        b_dz = b_dh * slope(b_z, ACT)
        if (LAYERS == 1) or (p_bits is not None):
            b_g = tl.load(p_g + (i_g * n_rows + o_pi) * n_cols + o_pj, mask=m_pair, other=0.0)  # [P]
            b_dz *= b_g[:, None]
            if p_dw is not None:
                b_dw += tl.sum(b_g[:, None] * activate(b_z, ACT), 0)
        b_dz = tl.reshape(b_dz, [BI, BJ, BN])
        p = p_du + ((i_g * n_col_tiles + i_col) * n_rows + o_i)[:, None] * H1 + o_l[None, :]
        tl.store(p, tl.sum(b_dz, 1), mask=(o_i < n_rows)[:, None] & m_l[None, :])
        b_dv += tl.sum(b_dz, 0)
    p = p_dv + ((i_g * n_split + i_split) * n_cols + o_j)[:, None] * H1 + o_l[None, :]
    tl.store(p, b_dv, mask=(o_j < n_cols)[:, None] & m_l[None, :])
    if p_dw is not None:
        tl.store(p_dw + ((i_g * n_split + i_split) * n_col_tiles + i_col) * H1 + o_l, b_dw, mask=m_l)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_split"])
def product_kernel(
    p_u, p_v, p_g, p_bits, p_d, p_out,
    n_rows, n_cols, pitch, H1, H2, n_split,
    ACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """m^T (g h1) or D^T h1 of a chunk, [G, n_split, H2, H1]: BK units of H2 and BN of H1 a program, by parts of the
    rows."""
    ACC: tl.constexpr = p_g.dtype.element_ty
    P: tl.constexpr = BI * BJ
    n_l, n_k = tl.cdiv(H1, BN), tl.cdiv(H2, BK)
    pid = tl.program_id(0).to(tl.int64)
    i_split = (pid // (n_l * n_k)) % n_split
    i_g = pid // (n_l * n_k * n_split)
    i_k = ((pid // n_l) % n_k * BK).to(tl.int32)
    o_k = i_k + tl.arange(0, BK)
    o_l = (pid % n_l * BN).to(tl.int32) + tl.arange(0, BN)
    n_part = tl.cdiv(tl.cdiv(n_rows, n_split), BI)  # tiles of rows
    start = i_split.to(tl.int32) * n_part
    n_part = tl.minimum(n_part, tl.cdiv(n_rows, BI) - start)
    n_words = tl.cdiv(H2, 32)
    p_u += i_g * n_rows * H1
    p_v += i_g * n_cols * H1
    b_out = tl.zeros([BK, BN], dtype=ACC)
    for i_t in range(0, n_part * tl.cdiv(n_cols, BJ)):
        r0, c0 = (start + i_t % n_part) * BI, i_t // n_part * BJ  # rows first: the columns' vectors stay in L1
        o_pi, o_pj = r0 + tl.arange(0, P) // BJ, c0 + tl.arange(0, P) % BJ
        m_pair = (o_pi < n_rows) & (o_pj < n_cols)
        b_h = hidden_tile(p_u, p_v, r0 + tl.arange(0, BI), c0 + tl.arange(0, BJ), o_l, n_rows, n_cols, H1, ACC, BI, BJ,
                          BN)  # fmt: skip
        b_h = activate(b_h, ACT)  # [P, BN]
        o_pair = (i_g * n_rows + o_pi) * n_cols + o_pj
        if p_bits is not None:
            b_h *= tl.load(p_g + o_pair, mask=m_pair, other=0.0)[:, None]
            b_d = load_bits_transposed(p_bits + i_g * n_rows * n_words * pitch, o_pi, o_pj, m_pair, i_k, n_words, pitch,
                                       ACT, DTYPE, P, BK)  # fmt: skip
        else:
            b_d = tl.load(p_d + o_pair[:, None] * H2 + o_k[None, :], mask=m_pair[:, None] & (o_k < H2)[None, :],
                          other=0.0)  # fmt: skip
            b_d = tl.trans(b_d)  # [BK, P]
        b_out = mma(b_d, operand(b_h, DTYPE, PRECISION), b_out, ACC, PRECISION)
    p = p_out + ((i_g * n_split + i_split) * H2 + o_k)[:, None] * H1 + o_l[None, :]
    tl.store(p, b_out, mask=(o_k < H2)[:, None] & (o_l < H1)[None, :])


def second_tiling(dtype: torch.dtype, interpreted: bool = False) -> Tiling:
    """BJ pairs at a time."""
    if interpreted:
        return Tiling(1, 32, 0, 32, 4, 1)
    side = 32 if dtype == torch.float64 else 64
    return Tiling(1, side, 0, side, 8, 1)


def first_tiling(dtype: torch.dtype, H1: int, H2: int, tf32: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype and widths, all free of register spills on sm_80 and sm_90."""
    if interpreted:
        return Tiling(4, 16, 32, 32, 4, 1)
    if dtype == torch.float64:
        return Tiling(2, 16, 32, 32, 4, 1)
    if dtype == torch.float32 and not tf32:
        if H1 % 16 or H2 % 16:
            return Tiling(1, 32, block(H1, 16, 32), 32, 4, 1)
        return Tiling(1, 32, block(H1, 16, 64), 32, 8, 1)
    if dtype == torch.float32:
        return Tiling(2, 32, block(H1, 16, 64), 32, 8, 1)
    # Rows that are not aligned take registers for their loads.
    if H1 % 16 or H2 % 16:
        return Tiling(1, 64, block(H1, 16, 32), block(H2, 32, 64), 8, 3)
    return Tiling(2, 64, block(H1, 16, 64), block(H2, 32, 64), 8, 3)


def product_tiling(dtype: torch.dtype, H1: int, H2: int, tf32: bool, bits: bool, interpreted: bool = False) -> Tiling:
    """Block sizes by dtype, widths and what D is made of, all free of register spills on sm_80 and sm_90."""
    if interpreted:
        return Tiling(4, 16, 32, 32, 4, 1)
    if dtype == torch.float64:
        return Tiling(1, 16, 32, 32, 4, 1)
    if dtype == torch.float32 and not tf32:
        return Tiling(1, 32, block(H1, 16, 64), block(H2, 32, 64), 8, 1)
    if dtype == torch.float32:
        return Tiling(1, 32, block(H1, 16, 64), block(H2, 32, 64), 8, 2)
    most = 64 if H1 % 16 or H2 % 16 else 128
    return Tiling(1, 64 if bits else 32, block(H1, 16, most), block(H2, 32, most), 8, 3)


def _new(k: Critic, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=k.accumulator, device=k.u.device)


def second_layer(k: Critic, g: Tensor, bits: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """s [G, H2] and None with bits; else db2 and dw [G, H2], with D in place of z."""
    (G, rows, columns), (_, H2) = k.sizes, k.widths
    t = second_tiling(k.dtype, INTERPRETED)
    blocks = triton.cdiv(H2, t.BK)
    n = splits(G * blocks, triton.cdiv(rows * columns, t.BJ))
    bias, dw = _new(k, G, n, H2), None if z is None else _new(k, G, n, H2)
    second_layer_kernel[(G * blocks * n,)](
        g, bits, z, k.w, bias, dw, rows, columns, columns if bits is None else bits.stride(2), H2, int(k.own), n,
        ACT=k.activation, BP=t.BJ, BK=t.BK, num_warps=t.num_warps, num_stages=t.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return bias.sum(1), None if dw is None else dw.sum(1)


def first_layer(
    k: Critic, g: Tensor, w2: Tensor | None, bits: Tensor | None, d: Tensor | None, need_w: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """du [G, R, H1], dv [G, C, H1] and, where needed with one hidden layer, dw [G, H1]. With bits, `w2` is
    diag(w) W2; where a chunk's layers are stored, `d` is dh1."""
    (G, rows, columns), (H1, H2) = k.sizes, k.widths
    precision = mode(k.dtype)
    t = first_tiling(k.dtype, H1, H2, precision == "tf32", INTERPRETED)
    tiles, blocks = triton.cdiv(columns, t.BJ), triton.cdiv(H1, t.BN)
    n = splits(G * tiles * blocks, triton.cdiv(rows, t.BI))
    du, dv = _new(k, G, tiles, rows, H1), _new(k, G, n, columns, H1)
    dw = _new(k, G, n, tiles, H1) if need_w else None
    first_layer_kernel[(G * tiles * blocks * n,)](
        k.u, k.v, w2, k.w, g, bits, d, du, dv, dw,
        rows, columns, columns if bits is None else bits.stride(2), H1, H2, int(k.own), n,
        ACT=k.activation, LAYERS=0 if k.stored else 2 if H2 else 1, PRECISION=precision,
        BI=t.BI, BJ=t.BJ, BN=t.BN, BK=t.BK, num_warps=t.num_warps, num_stages=t.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return du.sum(1), dv.sum(1), None if dw is None else dw.sum((1, 2))


def product(k: Critic, g: Tensor, bits: Tensor | None, d: Tensor | None) -> Tensor:
    """P or dW2 [G, H2, H1] of a chunk."""
    (G, rows, columns), (H1, H2) = k.sizes, k.widths
    precision = mode(k.dtype)
    t = product_tiling(k.dtype, H1, H2, precision == "tf32", bits is not None, INTERPRETED)
    blocks = triton.cdiv(H1, t.BN) * triton.cdiv(H2, t.BK)
    n = splits(G * blocks, triton.cdiv(rows, t.BI))
    out = _new(k, G, n, H2, H1)
    product_kernel[(G * blocks * n,)](
        k.u, k.v, g, bits, d, out, rows, columns, columns if bits is None else bits.stride(2), H1, H2, n,
        ACT=k.activation, DTYPE=TYPES[k.dtype], PRECISION=precision,
        BI=t.BI, BJ=t.BJ, BN=t.BN, BK=t.BK, num_warps=t.num_warps, num_stages=t.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out.sum(1)
