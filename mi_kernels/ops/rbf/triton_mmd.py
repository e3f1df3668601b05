"""Sums of a Gaussian kernel over pairs in Triton, with their gradients in the same pass (schema.py has the formulas).

x and y are one sequence z of n = B + N rows; a pair's weight goes by the sides of its two rows. With r_ij^2 the squared
distance in units of the smallest bandwidth, K kernels of precisions gamma_k in that unit, and weights that count a pair
in both orders,

    dz_i = s_i z_i - sum_j W_ij z_j,   W_ij = -4 weight_ij mean_k gamma_k exp(-gamma_k r_ij^2),   s_i = sum_j W_ij

Each row's sum and gradient are written by their owner, in a fixed order. FLOP in units of M = n^2 D: M for the value
alone (pairs i < j), 4 M with the gradients, where every pair is formed from both sides. Features wider than BO: the
slopes W of as many rows as fit CHUNK_BYTES are stored and a matmul reads them. O(n D) memory otherwise.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, dot_tile, hopper, load_tile, load_vector, mma
from .schema import NEED_BANDWIDTH, NEED_X, NEED_Y
from .triton_common import (
    INTERPRETED,
    Tiling,
    about_mean,
    add_along_differences,
    any_near,
    check,
    chunks,
    constants,
    difference_tile,
    direct_tiling,
    distance_tile,
    expm1,
    kernel,
    marks,
    place,
    split,
    tiling,
    without_own,
)  # fmt: skip


@triton.jit
def kernels_of(b_r, b_weight, b_of_gamma, p_gamma, K, o_kp, ACC: tl.constexpr, TERMS: tl.constexpr,
               WANT_WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Sums over the kernels of e and of gamma k: [BM, BN] each; adds those of weight k r^2 to b_of_gamma [BM, KP]."""
    b_e = tl.zeros([BM, BN], dtype=ACC)
    b_slope = tl.zeros([BM, BN], dtype=ACC)
    for k in range(K):
        gamma = tl.load(p_gamma + k)
        b_t = -gamma * b_r
        b_e_k = expm1(b_t, TERMS)
        b_k = kernel(b_t, b_e_k)
        b_e += b_e_k
        b_slope += gamma * b_k
        if WANT_WIDTH:
            b_of_k = tl.sum(b_weight * b_k * b_r, 1).to(tl.float64)  # [BM]
            b_of_gamma += tl.where((o_kp == k)[None, :], b_of_k[:, None], 0.0)
    return b_e, b_slope, b_of_gamma


@triton.jit(do_not_specialize=["n", "n_x", "first", "n_own", "n_splits", "n_slots"])
def mmd_kernel(
    p_z, p_norm, p_given, p_gamma, p_scale, p_near, p_sums, p_dwidth, p_slope, p_slope_sum, p_dz,
    n, n_x, D, K, first, n_own, n_splits, n_slots, xx, xx_low, yy, yy_low, xy, xy_low,
    EPS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, KP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, MARKED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n_own of z against a range of columns. p_sums [G, n_slots, 2, n_own]: sums of e over the
    columns of x and of y; p_dwidth [G, n_slots, n_own, KP]; p_slope [G, n_own, n] and its row sums, or p_dz [G, n, D].
    Without either, columns up to the own row are left out and the others count twice. DIRECT adds to p_dz, and writes
    the last slot of the sums; the ranges of columns have a slot each before it. MARKED: rows of a marked tile."""
    ACC: tl.constexpr = p_norm.dtype.element_ty
    HALF: tl.constexpr = (p_slope is None) and (p_dz is None)
    WANT_WIDTH: tl.constexpr = p_dwidth is not None
    i_g, i_split, i_own, begin, end = place(n_own, n_splits, n, BM, BN)
    o_chunk = i_own + tl.arange(0, BM)
    o_own = first + o_chunk
    n_end = first + n_own
    p_z += i_g * n * D
    p_given += i_g * n * D
    p_norm += i_g * n
    p_gamma += i_g * K
    scale = tl.load(p_scale + i_g)
    p_near += (i_g * tl.cdiv(n_own, MARKED) + i_own // MARKED) * tl.cdiv(n, BN)
    b_own_norm = load_vector(p_norm, o_own, n_end, 0.0)  # [BM]
    own_x = o_own < n_x
    b_zero = tl.zeros([BM], dtype=ACC)
    b_to_x = tl.where(own_x, b_zero + xx + xx_low, b_zero + xy + xy_low)  # [BM]
    b_to_y = tl.where(own_x, b_zero + xy + xy_low, b_zero + yy + yy_low)
    o_kp = tl.arange(0, KP)
    b_sum_x = tl.zeros([BM], dtype=tl.float64)
    b_sum_y = tl.zeros([BM], dtype=tl.float64)
    b_of_gamma = tl.zeros([BM, KP], dtype=tl.float64)
    b_slope_sum = tl.zeros([BM], dtype=ACC)
    o_o = tl.arange(0, BO)
    b_out = tl.zeros([BM, BO], dtype=ACC)
    if HALF:
        begin = tl.maximum(begin, (first + i_own) // BN * BN)
    for i in range(begin, end, BN):
        o_oth = i + tl.arange(0, BN)
        m_x = (o_oth < n_x)[None, :]
        m = (o_own < n_end)[:, None] & (o_oth < n)[None, :]
        b_count = tl.where(m, 1.0, 0.0).to(ACC)
        if HALF:
            b_count = tl.where(o_oth[None, :] > o_own[:, None], 2.0 * b_count, 0.0)
        if DIRECT:
            if tl.load(p_near + i // BN) != 0:
                b_r = difference_tile(p_given, scale, o_own, o_oth, n_end, n, D, ACC, BM, BN)
                b_weight = tl.where(m_x, b_to_x[:, None], b_to_y[:, None]) * b_count
                b_e, b_slope, b_of_gamma = kernels_of(
                    b_r, b_weight, b_of_gamma, p_gamma, K, o_kp, ACC, TERMS, WANT_WIDTH, BM, BN
                )
                b_e *= b_count
                b_sum_x += tl.sum(tl.where(m_x, b_e, 0.0), 1).to(tl.float64)
                b_sum_y += tl.sum(tl.where(m_x, 0.0, b_e), 1).to(tl.float64)
                if p_dz is not None:
                    b_slope = b_slope * b_weight * (-4.0 / K) * scale
                    add_along_differences(b_slope, p_given, p_dz + i_g * n * D, scale, o_own, o_oth, n_end, n, D)
        else:
            b_dot = dot_tile(p_z, p_z, o_own, o_oth, n_end, n, D, ACC, PRECISION, BM, BN, BK)  # [BM, BN]
            b_oth_norm = load_vector(p_norm, o_oth, n, 0.0)
            near = any_near(b_dot, b_own_norm, b_oth_norm, o_own, o_oth)
            tl.store(p_near + i // BN, near.to(tl.int8))
            b_r = distance_tile(b_dot, b_own_norm, b_oth_norm, o_own, o_oth, EPS)
            b_r = tl.where(near != 0, 0.0, b_r)
            b_count = tl.where(near != 0, 0.0, b_count)
            b_weight = tl.where(m_x, b_to_x[:, None], b_to_y[:, None]) * b_count
            b_e, b_slope, b_of_gamma = kernels_of(
                b_r, b_weight, b_of_gamma, p_gamma, K, o_kp, ACC, TERMS, WANT_WIDTH, BM, BN
            )
            b_e *= b_count
            b_sum_x += tl.sum(tl.where(m_x, b_e, 0.0), 1).to(tl.float64)
            b_sum_y += tl.sum(tl.where(m_x, 0.0, b_e), 1).to(tl.float64)
            if not HALF:
                b_slope = b_slope * b_weight * (-4.0 / K) * scale
                b_slope = without_own(b_slope, o_own, o_oth)
                b_slope_sum += tl.sum(b_slope, 1)
            if p_slope is not None:
                p_tile = p_slope + (i_g * n_own + o_chunk[:, None]) * n + o_oth[None, :]
                tl.store(p_tile, b_slope, mask=m)
            if p_dz is not None:
                b_oth = load_tile(p_z, o_oth, o_o, n, D)  # [BN, BO]
                b_out = mma(b_slope, b_oth, b_out, ACC, PRECISION)
    m_own = o_chunk < n_own
    i_slot = n_slots - 1 if DIRECT else i_split
    o_out = (i_g * n_slots + i_slot) * n_own + o_chunk
    p_sums += (i_g * n_slots + i_slot) * 2 * n_own + o_chunk
    tl.store(p_sums, b_sum_x, mask=m_own)
    tl.store(p_sums + n_own, b_sum_y, mask=m_own)
    if WANT_WIDTH:
        tl.store(p_dwidth + o_out[:, None] * KP + o_kp[None, :], b_of_gamma, mask=m_own[:, None])
    if not DIRECT:
        if p_slope is not None:
            tl.store(p_slope_sum + (i_g * n_splits + i_split) * n_own + o_chunk, b_slope_sum, mask=m_own)
        if p_dz is not None:
            b_out = b_slope_sum[:, None] * load_tile(p_z, o_own, o_o, n_end, D) - b_out
            p_dz += (i_g * n + o_own[:, None]) * D + o_o[None, :]
            tl.store(p_dz, b_out, mask=m_own[:, None] & (o_o < D)[None, :])


def _two_floats(w: float) -> tuple[float, float]:
    """w as a sum of two fp32 numbers, the form in which a kernel takes it."""
    high = struct.unpack("f", struct.pack("f", w))[0]
    return high, w - high


class _Sums:
    """Launches on chunks of rows of z, and what they add up to."""

    def __init__(self, given: torch.Tensor, n_x: int, width: torch.Tensor, weights: tuple[float, float, float]):
        self.given, self.n_x, self.width, self.weights = given, n_x, width, weights
        self.scale = width.amin(1).reciprocal() if width.shape[1] > 1 else width[:, 0].reciprocal()
        # Of samples in units 1 / scale. Not in the kernel: a division in fp64 is a call, for which registers are saved.
        self.gamma = 0.5 / (width * self.scale[:, None]).square()
        self.z = about_mean(given, self.scale)
        self.norm = self.z.square().sum(-1)
        self.value = given.new_zeros(given.shape[0], dtype=torch.float64)
        self.dwidth = given.new_zeros(width.shape, dtype=torch.float64)

    def add(self, t: Tiling, first: int, rows: int, want_width: bool, dz: torch.Tensor | None, fused: bool) -> None:
        """Adds the sums of these rows and writes their rows of dz, if given: in the kernel, or by a matmul."""
        (G, n, D), K = self.z.shape, self.gamma.shape[1]
        splits = 1 if dz is not None and fused else split(G, rows, n, t)
        KP = triton.next_power_of_2(K)
        new = lambda *shape, dtype=self.z.dtype: torch.empty((G, *shape), dtype=dtype, device=self.z.device)  # noqa: E731
        sums = new(splits + 1, 2, rows, dtype=torch.float64)
        dwidth = new(splits + 1, rows, KP, dtype=torch.float64) if want_width else None
        slope = None if dz is None or fused else new(rows, n)
        slope_sum = None if slope is None else new(splits, rows)
        near = marks(G, rows, n, t, self.z)
        halves = [part for w in self.weights for part in _two_floats(w)]

        def launch(splits: int, slope: torch.Tensor | None, out: torch.Tensor | None, direct: bool) -> None:
            here = direct_tiling(t) if direct else t
            mmd_kernel[(G * splits * triton.cdiv(rows, here.BM),)](
                self.z, self.norm, self.given, self.gamma, self.scale, near, sums, dwidth, slope, slope_sum, out,
                n, self.n_x, D, K, first, rows, splits, sums.shape[1], *halves, KP=KP, **constants(self.z.dtype),
                BM=here.BM, BN=t.BN, BK=t.BK, BO=t.BO, MARKED=t.BM, DIRECT=direct,
                num_warps=here.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
            )  # fmt: skip

        launch(splits, slope, dz if fused else None, False)
        if dz is not None and slope is not None and slope_sum is not None:
            part = slice(first, first + rows)
            torch.mul(slope_sum.sum(1)[..., None], self.z[:, part], out=dz[:, part])
            dz[:, part] -= torch.bmm(slope, self.z)
        launch(1, None, dz, True)
        xx, yy, xy = self.weights
        of_x = max(0, min(self.n_x - first, rows))
        to_x, to_y = sums.sum(1).unbind(1)
        inside = xx * to_x[:, :of_x].sum(1) + yy * to_y[:, of_x:].sum(1)
        self.value += (inside + xy * (to_y[:, :of_x].sum(1) + to_x[:, of_x:].sum(1))) / K
        if dwidth is not None:
            self.dwidth += dwidth[..., :K].sum((1, 2)) * (2.0 / K * self.gamma / self.width)


def mmd(
    x: torch.Tensor, y: torch.Tensor, bandwidth: torch.Tensor, w_xx: float, w_yy: float, w_xy: float, needs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(value [G] in fp64, and the gradients of x, y and bandwidth that `needs` asks for, else empty)."""
    check("rbf_mmd", INTERPRETED, x, y)
    dtype = accumulate_dtype(x.dtype)
    (_, B, D), N = x.shape, y.shape[1]
    z = (torch.cat([x, y], 1) if N else x).to(dtype).contiguous()
    problem = _Sums(z, B, bandwidth.to(dtype).contiguous(), (w_xx, w_yy, w_xy / 2))
    want_width = bool(needs & NEED_BANDWIDTH)
    dz = None
    with device_guard(x):
        if not needs & (NEED_X | NEED_Y):
            problem.add(tiling(dtype, D, INTERPRETED, False, 1, hopper(x.device)), 0, B + N, want_width, None, True)
        else:
            dz = _with_gradient(problem, want_width)
    return (
        problem.value,
        dz[:, :B].to(x.dtype).contiguous() if dz is not None and needs & NEED_X else x.new_empty(0),
        dz[:, B:].to(y.dtype).contiguous() if dz is not None and needs & NEED_Y else y.new_empty(0),
        problem.dwidth.to(bandwidth.dtype) if want_width else bandwidth.new_empty(0),
    )


def _with_gradient(problem: _Sums, want_width: bool) -> torch.Tensor:
    G, n, D = problem.z.shape
    t = tiling(problem.z.dtype, D, INTERPRETED, True, 1, hopper(problem.z.device))
    dz = torch.empty_like(problem.z)
    fused = t.BO >= D
    for first, rows in [(0, n)] if fused else chunks(G, n, n, dz.element_size(), t.BM):
        problem.add(t, first, rows, want_width, dz, fused)
    return dz
