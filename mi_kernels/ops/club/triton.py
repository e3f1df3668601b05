"""The Gaussian CLUB bound in Triton: one pass over memory forward, one backward (schema.py has the formulas).

Forward, a deterministic reduction in two stages. A program sums a stretch of rows about the mean r of its first tile,
with c = y - r and m = mu - r:  sum c, sum c^2, sum w, sum w m and Q = sum w (2 m - c) c.  A second kernel brings the
stretches to the common ybar = r + d, where c and m become c - d and m - d:

    sum (c - d)^2 = sum c^2 - 2 d sum c + n d^2
    sum w (v - (c - d)^2 + 2 (m - d)(c - d)) = (v + d^2) sum w + Q - 2 d sum w m

so that nothing of the size of ybar is ever subtracted. Backward is elementwise. 15 B D FLOP and 3 B D reads forward,
30 B D FLOP, 3 B D reads and as many writes backward.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, load_tile
from .schema import MOMENTS, NEED_LOGVAR, NEED_MU, NEED_Y

SUMS = tl.constexpr(6)
_PROGRAMS = 1024  # programs of the first stage; a constant, so that sums have one order on every GPU
_MAX_SIDE = 2**30


@triton.jit
def weight_tile(p_logvar, o_i, o_d, n, D, m, ACC: tl.constexpr):
    """exp(-logvar) inside of the matrix, 0 outside: [BM, BD]."""
    if p_logvar is None:
        return tl.where(m, 1.0, 0.0).to(ACC)
    else:
        return tl.where(m, tl.exp(-load_tile(p_logvar, o_i, o_d, n, D).to(ACC)), 0.0)


@triton.jit(do_not_specialize=["B", "rows", "n_parts"])
def moments_kernel(p_mu, p_logvar, p_y, p_part, B, D, rows, n_parts, BM: tl.constexpr, BD: tl.constexpr):
    """Sums over `rows` rows about the mean of their first tile, and that mean: [G, n_parts, SUMS, D]."""
    ACC: tl.constexpr = p_part.dtype.element_ty
    n_d = tl.cdiv(D, BD)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_d * n_parts)
    i_part = ((pid // n_d) % n_parts).to(tl.int32)
    o_d = ((pid % n_d) * BD).to(tl.int32) + tl.arange(0, BD)
    begin = i_part * rows
    end = tl.minimum(begin + rows, B)
    p_mu += i_g * B * D
    p_y += i_g * B * D
    if p_logvar is not None:
        p_logvar += i_g * B * D
    b_y = load_tile(p_y, begin + tl.arange(0, BM), o_d, end, D).to(ACC)  # [BM, BD]
    b_r = tl.sum(b_y, 0) / tl.minimum(end - begin, BM).to(ACC)  # [BD]
    b_c1 = tl.zeros([BM, BD], dtype=ACC)
    b_c2 = tl.zeros([BM, BD], dtype=ACC)
    b_w1 = tl.zeros([BM, BD], dtype=ACC)
    b_wm = tl.zeros([BM, BD], dtype=ACC)
    b_q = tl.zeros([BM, BD], dtype=ACC)
    for i in range(begin, end, BM):
        o_i = i + tl.arange(0, BM)
        m = (o_i < end)[:, None] & (o_d < D)[None, :]
        b_c = tl.where(m, load_tile(p_y, o_i, o_d, end, D).to(ACC) - b_r[None, :], 0.0)
        b_m = tl.where(m, load_tile(p_mu, o_i, o_d, end, D).to(ACC) - b_r[None, :], 0.0)
        b_w = weight_tile(p_logvar, o_i, o_d, end, D, m, ACC)
        b_c1 += b_c
        b_c2 += b_c * b_c
        b_w1 += b_w
        b_wm += b_w * b_m
        b_q += b_w * ((2.0 * b_m - b_c) * b_c)
    p_part += (i_g * n_parts + i_part) * SUMS * D + o_d
    m_d = o_d < D
    tl.store(p_part, b_r, mask=m_d)
    tl.store(p_part + D, tl.sum(b_c1, 0), mask=m_d)
    tl.store(p_part + 2 * D, tl.sum(b_c2, 0), mask=m_d)
    tl.store(p_part + 3 * D, tl.sum(b_w1, 0), mask=m_d)
    tl.store(p_part + 4 * D, tl.sum(b_wm, 0), mask=m_d)
    tl.store(p_part + 5 * D, tl.sum(b_q, 0), mask=m_d)


@triton.jit
def load_parts(p_part, o_k, o_d, which, n_parts, D):
    m = (o_k < n_parts)[:, None] & (o_d < D)[None, :]
    return tl.load(p_part + (o_k.to(tl.int64)[:, None] * SUMS + which) * D + o_d[None, :], mask=m, other=0.0)


@triton.jit(do_not_specialize=["B", "rows", "n_parts"])
def combine_kernel(
    p_part, p_moments, p_value, B, D, rows, n_parts,
    MOMENTS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The moments of schema.py, [G, MOMENTS, D], and a summand of the value for every block of features."""
    ACC: tl.constexpr = p_part.dtype.element_ty
    n_d = tl.cdiv(D, BD)
    i_g = tl.program_id(0).to(tl.int64) // n_d
    i_d = tl.program_id(0) % n_d
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_part += i_g * n_parts * SUMS * D
    b_first = tl.load(p_part + o_d, mask=m_d, other=0.0)  # [BD]
    size = B.to(ACC)
    b_shift = tl.zeros([BK, BD], dtype=ACC)
    for k in range(0, n_parts, BK):
        o_k = k + tl.arange(0, BK)
        b_n = tl.maximum(tl.minimum(B - o_k * rows, rows), 0).to(ACC)  # [BK]
        b_r = load_parts(p_part, o_k, o_d, 0, n_parts, D)  # [BK, BD]
        b_shift += b_n[:, None] * (b_r - b_first[None, :]) + load_parts(p_part, o_k, o_d, 1, n_parts, D)
    b_mean = tl.sum(b_shift, 0) / size
    b_high = b_first + b_mean
    b_low = b_mean - (b_high - b_first)

    b_c2 = tl.zeros([BK, BD], dtype=ACC)
    b_w1 = tl.zeros([BK, BD], dtype=ACC)
    b_wm = tl.zeros([BK, BD], dtype=ACC)
    b_rest = tl.zeros([BK, BD], dtype=ACC)
    for k in range(0, n_parts, BK):
        o_k = k + tl.arange(0, BK)
        b_n = tl.maximum(tl.minimum(B - o_k * rows, rows), 0).to(ACC)  # [BK]
        m = (o_k < n_parts)[:, None] & m_d[None, :]
        b_d = tl.where(m, b_high[None, :] - load_parts(p_part, o_k, o_d, 0, n_parts, D) + b_low[None, :], 0.0)
        b_pc = load_parts(p_part, o_k, o_d, 1, n_parts, D)
        b_pw = load_parts(p_part, o_k, o_d, 3, n_parts, D)
        b_pm = load_parts(p_part, o_k, o_d, 4, n_parts, D)
        b_c2 += load_parts(p_part, o_k, o_d, 2, n_parts, D) - 2.0 * b_d * b_pc + b_n[:, None] * b_d * b_d
        b_w1 += b_pw
        b_wm += b_pm - b_d * b_pw
        b_rest += load_parts(p_part, o_k, o_d, 5, n_parts, D) - 2.0 * b_d * b_pm + b_d * b_d * b_pw
    b_v = tl.sum(b_c2, 0) / size
    b_w = tl.sum(b_w1, 0)
    p_moments += i_g * MOMENTS * D + o_d
    tl.store(p_moments, b_high, mask=m_d)
    tl.store(p_moments + D, b_low, mask=m_d)
    tl.store(p_moments + 2 * D, b_v, mask=m_d)
    tl.store(p_moments + 3 * D, b_w / size, mask=m_d)
    tl.store(p_moments + 4 * D, tl.sum(b_wm, 0) / size, mask=m_d)
    b_value = tl.where(m_d, b_v * b_w + tl.sum(b_rest, 0), 0.0)
    tl.store(p_value + tl.program_id(0), tl.sum(b_value, 0) / (2.0 * size))


@triton.jit(do_not_specialize=["B"])
def gradient_kernel(
    p_mu, p_logvar, p_y, p_moments, p_g, p_dmu, p_dlogvar, p_dy, B, D,
    MOMENTS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = p_moments.dtype.element_ty
    n_d = tl.cdiv(D, BD)
    n_b = tl.cdiv(B, BM)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_d * n_b)
    o_i = (((pid // n_d) % n_b) * BM).to(tl.int32) + tl.arange(0, BM)
    o_d = ((pid % n_d) * BD).to(tl.int32) + tl.arange(0, BD)
    m_d = o_d < D
    p_moments += i_g * MOMENTS * D + o_d
    b_high = tl.load(p_moments, mask=m_d, other=0.0)[None, :]
    b_low = tl.load(p_moments + D, mask=m_d, other=0.0)[None, :]
    offset = i_g * B * D
    m = (o_i < B)[:, None] & m_d[None, :]
    b_m = load_tile(p_mu + offset, o_i, o_d, B, D).to(ACC) - b_high - b_low  # [BM, BD]
    b_c = load_tile(p_y + offset, o_i, o_d, B, D).to(ACC) - b_high - b_low
    b_w = weight_tile(None if p_logvar is None else p_logvar + offset, o_i, o_d, B, D, m, ACC)
    b_scale = tl.load(p_g + i_g).to(ACC) / B.to(ACC)
    o_out = offset + o_i.to(tl.int64)[:, None] * D + o_d[None, :]
    if p_dmu is not None:
        tl.store(p_dmu + o_out, (b_scale * b_w * b_c).to(p_dmu.dtype.element_ty), mask=m)
    if p_dlogvar is not None:
        b_v = tl.load(p_moments + 2 * D, mask=m_d, other=0.0)[None, :]
        b_out = -0.5 * b_scale * b_w * (b_v - b_c * b_c + 2.0 * b_m * b_c)
        tl.store(p_dlogvar + o_out, b_out.to(p_dlogvar.dtype.element_ty), mask=m)
    if p_dy is not None:
        b_w1 = tl.load(p_moments + 3 * D, mask=m_d, other=0.0)[None, :]
        b_wm = tl.load(p_moments + 4 * D, mask=m_d, other=0.0)[None, :]
        b_out = b_scale * (b_w1 * b_c - b_wm - b_w * (b_c - b_m))
        tl.store(p_dy + o_out, b_out.to(p_dy.dtype.element_ty), mask=m)


INTERPRETED = not isinstance(moments_kernel, triton.runtime.JITFunction)


class Tiling(NamedTuple):
    """Tiles of BM x BD forward and backward; BK stretches of BF features at a time in between."""

    BM: int
    BD: int
    BK: int
    BF: int
    num_warps: int  # twice as many backward


def tiling(dtype: torch.dtype, interpreted: bool = False) -> Tiling:
    """Free of register spills on sm_80 and sm_90; a warp reads 256 bytes of a row of bf16. The kernel that combines the
    stretches of rows takes few features a program and many stretches at a time: its sequential steps set the time."""
    if interpreted:
        return Tiling(8, 16, 2, 16, 4)
    return Tiling(8, 64, 32, 16, 4) if dtype == torch.float64 else Tiling(16, 128, 64, 16, 4)


def split(groups: int, B: int, D: int, t: Tiling) -> tuple[int, int]:
    """Rows of a stretch, and how many stretches there are."""
    want = max(1, _PROGRAMS // (groups * triton.cdiv(D, t.BD)))
    rows = max(4 * t.BM, triton.cdiv(triton.cdiv(B, want), t.BM) * t.BM)
    return rows, triton.cdiv(B, rows)


def _check(mu: torch.Tensor) -> None:
    if not (INTERPRETED or mu.is_cuda):
        raise RuntimeError(f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got mu on {mu.device}")
    if max(mu.shape[-2:]) > _MAX_SIDE:
        raise ValueError(f"B and D must not exceed {_MAX_SIDE}, got mu {tuple(mu.shape)}")


def forward(
    mu: torch.Tensor, logvar: torch.Tensor | None, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value [*], moments [*, 5, D]) of contiguous inputs [*, B, D]. Three launches, two where D fits one block."""
    _check(mu)
    (*groups, B, D), t = mu.shape, tiling(mu.dtype, INTERPRETED)
    G = math.prod(groups)
    rows, n_parts = split(G, B, D, t)
    n_d, n_f = triton.cdiv(D, t.BD), triton.cdiv(D, t.BF)
    part = torch.empty((G, n_parts, SUMS.value, D), dtype=accumulate_dtype(mu.dtype), device=mu.device)
    moments = torch.empty((*groups, MOMENTS, D), dtype=accumulate_dtype(mu.dtype), device=mu.device)
    value = torch.empty((G, n_f), dtype=accumulate_dtype(mu.dtype), device=mu.device)
    with device_guard(mu):
        moments_kernel[(G * n_parts * n_d,)](
            mu, logvar, y, part, B, D, rows, n_parts,
            BM=t.BM, BD=t.BD, num_warps=t.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        combine_kernel[(G * n_f,)](
            part, moments, value, B, D, rows, n_parts,
            MOMENTS=MOMENTS, BK=t.BK, BD=t.BF, num_warps=t.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return (value if n_f == 1 else value.sum(1)).view(groups), moments


def backward(
    mu: torch.Tensor, logvar: torch.Tensor | None, y: torch.Tensor, moments: torch.Tensor, g: torch.Tensor, needs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of mu, logvar and y, empty where `needs` does not ask. One launch."""
    _check(mu)
    (*groups, B, D), t = mu.shape, tiling(mu.dtype, INTERPRETED)
    G = math.prod(groups)
    bits = (NEED_MU, NEED_LOGVAR, NEED_Y)
    # The interpreter would cut off to bfloat16 instead of rounding.
    dtype = accumulate_dtype(mu.dtype) if INTERPRETED else mu.dtype
    out = [torch.empty(mu.shape if needs & bit else (0,), dtype=dtype, device=mu.device) for bit in bits]
    with device_guard(mu):
        gradient_kernel[(G * triton.cdiv(B, t.BM) * triton.cdiv(D, t.BD),)](
            mu, logvar, y, moments, g, *(o if needs & bit else None for o, bit in zip(out, bits, strict=True)), B, D,
            MOMENTS=MOMENTS, BM=t.BM, BD=t.BD, num_warps=2 * t.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out[0].to(mu.dtype), out[1].to(mu.dtype), out[2].to(mu.dtype)
