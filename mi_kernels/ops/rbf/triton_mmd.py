"""Sums of a Gaussian kernel over pairs in Triton, with their gradients in the same pass (schema.py has the formulas).

x and y are one sequence z of n = B + N rows; a pair's weight goes by the sides of its two rows. With r_ij^2 the squared
distance, K kernels of precisions gamma_k, and weights that count a pair in both orders,

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
from ..common.triton import device_guard, dot_tile, load_tile, load_vector, mma
from .schema import NEED_GAMMA, NEED_X, NEED_Y
from .triton_common import INTERPRETED, Tiling, check, chunks, constants, distance_tile, expm1, place, split, tiling


@triton.jit(do_not_specialize=["n", "n_x", "first", "n_own", "n_splits"])
def mmd_kernel(
    p_z, p_norm, p_gamma, p_sums, p_dgamma, p_slope, p_slope_sum, p_dz,
    n, n_x, D, K, first, n_own, n_splits, xx, xx_low, yy, yy_low, xy, xy_low,
    EPS: tl.constexpr, TERMS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n_own of z against a range of columns. p_sums [G, n_splits, 2, n_own]: sums of e over the
    columns of x and of y; p_dgamma [G, n_splits, n_own, KP]; p_slope [G, n_own, n] and its row sums, or p_dz
    [G, n_own, D]. Without either, columns up to the own row are left out and the others count twice."""
    ACC: tl.constexpr = p_norm.dtype.element_ty
    HALF: tl.constexpr = (p_slope is None) and (p_dz is None)
    i_g, i_split, i_own, begin, end = place(n_own, n_splits, n, BM, BN)
    o_chunk = i_own + tl.arange(0, BM)
    o_own = first + o_chunk
    n_end = first + n_own
    p_z += i_g * n * D
    p_norm += i_g * n
    p_gamma += i_g * K
    b_own_norm = load_vector(p_norm, o_own, n_end, 0.0)  # [BM]
    own_x = o_own < n_x
    b_zero = tl.zeros([BM], dtype=ACC)
    b_to_x = tl.where(own_x, b_zero + xx + xx_low, b_zero + xy + xy_low)  # [BM]
    b_to_y = tl.where(own_x, b_zero + xy + xy_low, b_zero + yy + yy_low)
    o_kp = tl.arange(0, KP)
    b_sum_x = tl.zeros([BM], dtype=tl.float64)
    b_sum_y = tl.zeros([BM], dtype=tl.float64)
    b_dgamma = tl.zeros([BM, KP], dtype=tl.float64)
    b_slope_sum = tl.zeros([BM], dtype=ACC)
    o_o = tl.arange(0, BO)
    b_out = tl.zeros([BM, BO], dtype=ACC)
    if HALF:
        begin = tl.maximum(begin, (first + i_own) // BN * BN)
    for i in range(begin, end, BN):
        o_oth = i + tl.arange(0, BN)
        b_dot = dot_tile(p_z, p_z, o_own, o_oth, n_end, n, D, ACC, "ieee", BM, BN, BK)  # [BM, BN]
        b_r = distance_tile(b_dot, b_own_norm, load_vector(p_norm, o_oth, n, 0.0), o_own, o_oth, EPS)
        m_x = (o_oth < n_x)[None, :]
        m = (o_own < n_end)[:, None] & (o_oth < n)[None, :]
        b_count = tl.where(m, 1.0, 0.0).to(ACC)
        if HALF:
            b_count = tl.where(o_oth[None, :] > o_own[:, None], 2.0 * b_count, 0.0)
        b_weight = tl.where(m_x, b_to_x[:, None], b_to_y[:, None]) * b_count
        b_e = tl.zeros([BM, BN], dtype=ACC)
        b_slope = tl.zeros([BM, BN], dtype=ACC)
        for k in range(K):
            gamma = tl.load(p_gamma + k)
            b_k = expm1(-gamma * b_r, TERMS)
            b_e += b_k
            b_slope += gamma * (b_k + 1.0)
            if p_dgamma is not None:
                b_of_k = tl.sum(b_weight * (b_k + 1.0) * b_r, 1).to(tl.float64)  # [BM]
                b_dgamma += tl.where((o_kp == k)[None, :], b_of_k[:, None], 0.0)
        b_e *= b_count
        b_sum_x += tl.sum(tl.where(m_x, b_e, 0.0), 1).to(tl.float64)
        b_sum_y += tl.sum(tl.where(m_x, 0.0, b_e), 1).to(tl.float64)
        if not HALF:
            b_slope = b_slope * b_weight * -4.0 / K
            b_slope_sum += tl.sum(b_slope, 1)
        if p_slope is not None:
            p_tile = p_slope + (i_g * n_own + o_chunk[:, None]) * n + o_oth[None, :]
            tl.store(p_tile, b_slope, mask=m)
        if p_dz is not None:
            b_oth = load_tile(p_z, o_oth, o_o, n, D)  # [BN, BO]
            b_out = mma(b_slope, b_oth, b_out, ACC, "ieee")
    m_own = o_chunk < n_own
    o_out = (i_g * n_splits + i_split) * n_own + o_chunk
    p_sums += (i_g * n_splits + i_split) * 2 * n_own + o_chunk
    tl.store(p_sums, b_sum_x, mask=m_own)
    tl.store(p_sums + n_own, b_sum_y, mask=m_own)
    if p_dgamma is not None:
        tl.store(p_dgamma + o_out[:, None] * KP + o_kp[None, :], b_dgamma, mask=m_own[:, None])
    if p_slope is not None:
        tl.store(p_slope_sum + o_out, b_slope_sum, mask=m_own)
    if p_dz is not None:
        b_out = b_slope_sum[:, None] * load_tile(p_z, o_own, o_o, n_end, D) - b_out
        p_dz += (i_g * n_own + o_chunk[:, None]) * D + o_o[None, :]
        tl.store(p_dz, b_out, mask=m_own[:, None] & (o_o < D)[None, :])


def _two_floats(w: float) -> tuple[float, float]:
    """w as a sum of two fp32 numbers, the form in which a kernel takes it."""
    high = struct.unpack("f", struct.pack("f", w))[0]
    return high, w - high


class _Sums:
    """Launches on chunks of rows of z, and what they add up to."""

    def __init__(self, z: torch.Tensor, n_x: int, gamma: torch.Tensor, weights: tuple[float, float, float]):
        self.z, self.n_x, self.gamma = z, n_x, gamma
        self.norm = z.square().sum(-1)
        self.weights = weights
        self.value = z.new_zeros(z.shape[0], dtype=torch.float64)
        self.dgamma = z.new_zeros(gamma.shape, dtype=torch.float64)

    def launch(
        self, t: Tiling, first: int, rows: int, want_gamma: bool, slope: torch.Tensor | None, dz: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Adds the sums of these rows; returns the row sums of the slopes [G, rows] where those are stored."""
        (G, n, D), K = self.z.shape, self.gamma.shape[1]
        splits = 1 if dz is not None else split(G, rows, n, t)
        new = lambda *shape, dtype: torch.empty((G, splits, *shape), dtype=dtype, device=self.z.device)  # noqa: E731
        KP = triton.next_power_of_2(K)
        sums = new(2, rows, dtype=torch.float64)
        dgamma = new(rows, KP, dtype=torch.float64) if want_gamma else None
        slope_sum = None if slope is None else new(rows, dtype=self.z.dtype)
        halves = [part for w in self.weights for part in _two_floats(w)]
        mmd_kernel[(G * splits * triton.cdiv(rows, t.BM),)](
            self.z, self.norm, self.gamma, sums, dgamma, slope, slope_sum, dz,
            n, self.n_x, D, K, first, rows, splits, *halves, KP=KP, **constants(self.z.dtype),
            BM=t.BM, BN=t.BN, BK=t.BK, BO=t.BO, num_warps=t.num_warps, num_stages=t.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        xx, yy, xy = self.weights
        of_x = max(0, min(self.n_x - first, rows))
        to_x, to_y = sums.sum(1).unbind(1)
        inside = xx * to_x[:, :of_x].sum(1) + yy * to_y[:, of_x:].sum(1)
        self.value += (inside + xy * (to_y[:, :of_x].sum(1) + to_x[:, of_x:].sum(1))) / K
        if dgamma is not None:
            self.dgamma -= dgamma[..., :K].sum((1, 2)) / K
        return None if slope_sum is None else slope_sum.sum(1)


def mmd(
    x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor, w_xx: float, w_yy: float, w_xy: float, needs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(value [G] in fp64, and the gradients of x, y and gamma that `needs` asks for, else empty)."""
    check("rbf_mmd", INTERPRETED, x, y)
    dtype = accumulate_dtype(x.dtype)
    (_, B, D), N = x.shape, y.shape[1]
    z = (torch.cat([x, y], 1) if N else x).to(dtype).contiguous()
    problem = _Sums(z, B, gamma.to(dtype), (w_xx, w_yy, w_xy / 2))
    want_gamma = bool(needs & NEED_GAMMA)
    dz = None
    with device_guard(x):
        if not needs & (NEED_X | NEED_Y):
            problem.launch(tiling(dtype, D, INTERPRETED, False), 0, B + N, want_gamma, None, None)
        else:
            dz = _with_gradient(problem, want_gamma)
    return (
        problem.value,
        dz[:, :B].to(x.dtype).contiguous() if dz is not None and needs & NEED_X else x.new_empty(0),
        dz[:, B:].to(y.dtype).contiguous() if dz is not None and needs & NEED_Y else y.new_empty(0),
        problem.dgamma.to(gamma.dtype) if want_gamma else gamma.new_empty(0),
    )


def _with_gradient(problem: _Sums, want_gamma: bool) -> torch.Tensor:
    z = problem.z
    G, n, D = z.shape
    t = tiling(z.dtype, D, INTERPRETED, True)
    dz = torch.empty_like(z)
    if t.BO >= D:
        problem.launch(t, 0, n, want_gamma, None, dz)
        return dz
    for first, rows in chunks(G, n, n, z.element_size(), t.BM):
        slope = torch.empty((G, rows, n), dtype=z.dtype, device=z.device)
        slope_sum = problem.launch(t, first, rows, want_gamma, slope, None)
        assert slope_sum is not None
        part = slice(first, first + rows)
        torch.mul(slope_sum[..., None], z[:, part], out=dz[:, part])
        dz[:, part] -= torch.bmm(slope, z)
    return dz
