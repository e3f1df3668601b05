"""HSIC's sums over pairs in Triton, and their gradients by recomputation (hsic.py has the formulas).

Forward, one pass over the pairs: row sums of E and F and of the products EF, EE and FF, written by the row's owner.
Samples are in units of their bandwidth, where gamma is 1/2. Backward, one pass: with He_ij = E_ij - e_i - e_j + e (e_i
the mean of row i, e of all) and Hf likewise,

    A_ij = (g_0 Hf_ij + 2 g_1 He_ij) (E_ij + 1),   W = -2 A / bandwidth,   s_i = sum_j W_ij
    dx_i = s_i x_i - sum_j W_ij x_j,   dbandwidth = sum A r^2 / bandwidth;   y likewise

2 B^2 (Dx + Dy) FLOP forward, twice that backward, O(B D) memory: features wider than BO go through a slope buffer of at
most CHUNK_BYTES (one row tile at least) and a matmul.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, dot_tile, hopper, load_tile, load_vector, mma
from .schema import NEED_BANDWIDTH, NEED_BANDWIDTH_Y, NEED_X, NEED_Y
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

SUMS = tl.constexpr(5)


@triton.jit
def side_tile(p, p_norm, o_own, o_oth, n_own, n, D, ACC: tl.constexpr, EPS: tl.constexpr,
              PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Squared distances of one side's rows and columns, [BM, BN], and whether a pair is too near for them."""
    b_dot = dot_tile(p, p, o_own, o_oth, n_own, n, D, ACC, PRECISION, BM, BN, BK)
    b_own_norm = load_vector(p_norm, o_own, n_own, 0.0)  # [BM]
    b_oth_norm = load_vector(p_norm, o_oth, n, 0.0)
    near = any_near(b_dot, b_own_norm, b_oth_norm, o_own, o_oth)
    return distance_tile(b_dot, b_own_norm, b_oth_norm, o_own, o_oth, EPS), near


@triton.jit
def row_sums(b_rx, b_ry, m, TERMS: tl.constexpr):
    """Row sums of E, F, EF, EE and FF: [BM] each."""
    b_e = tl.where(m, expm1(-0.5 * b_rx, TERMS), 0.0)
    b_f = tl.where(m, expm1(-0.5 * b_ry, TERMS), 0.0)
    b_e1 = tl.sum(b_e, 1).to(tl.float64)
    b_f1 = tl.sum(b_f, 1).to(tl.float64)
    b_ef = tl.sum(b_e * b_f, 1).to(tl.float64)
    b_ee = tl.sum(b_e * b_e, 1).to(tl.float64)
    b_ff = tl.sum(b_f * b_f, 1).to(tl.float64)
    return b_e1, b_f1, b_ef, b_ee, b_ff


@triton.jit
def centred_tile(b_e, p_own, p_oth, o_own, o_oth, n_own, n):
    """e less the means of its row and of its column, plus that of all: [BM, BN]. Means come as two summands each: the
    rounding of one would be the same all along a row, and add up in the gradients."""
    b_he = b_e - load_vector(p_own, o_own, n_own, 0.0)[:, None] - load_vector(p_oth, o_oth, n, 0.0)[None, :]
    b_rest = load_vector(p_own + n, o_own, n_own, 0.0)[:, None] + load_vector(p_oth + n, o_oth, n, 0.0)[None, :]
    return b_he - b_rest


@triton.jit
def slopes(b_rx, b_ry, m, p_own_mean, p_mean, p_g, o_own, o_oth, n_own, n, TERMS: tl.constexpr):
    """A of x and of y: [BM, BN] each."""
    b_e = expm1(-0.5 * b_rx, TERMS)
    b_kx = kernel(-0.5 * b_rx, b_e)
    b_he = centred_tile(b_e, p_own_mean, p_mean, o_own, o_oth, n_own, n)  # [BM, BN]
    b_f = expm1(-0.5 * b_ry, TERMS)
    b_ky = kernel(-0.5 * b_ry, b_f)
    b_hf = centred_tile(b_f, p_own_mean + 2 * n, p_mean + 2 * n, o_own, o_oth, n_own, n)
    g_xy = tl.load(p_g)
    g_xx = 2.0 * tl.load(p_g + 1)
    g_yy = 2.0 * tl.load(p_g + 2)
    b_ax = tl.where(m, (g_xy * b_hf + g_xx * b_he) * b_kx, 0.0)
    b_ay = tl.where(m, (g_xy * b_he + g_yy * b_hf) * b_ky, 0.0)
    return b_ax, b_ay


@triton.jit(do_not_specialize=["n", "n_splits", "n_slots"])
def hsic_kernel(
    p_x, p_y, p_x_norm, p_y_norm, p_x_given, p_y_given, p_x_scale, p_y_scale, p_near, p_sums, n, DX, DY, n_splits,
    n_slots, EPS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MARKED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Row sums of E, F, EF, EE and FF over a range of columns: [G, n_slots, SUMS, n], the last slot by DIRECT."""
    ACC: tl.constexpr = p_x_norm.dtype.element_ty
    i_g, i_split, i_own, begin, end = place(n, n_splits, n, BM, BN)
    o_own = i_own + tl.arange(0, BM)
    p_x += i_g * n * DX
    p_y += i_g * n * DY
    p_x_norm += i_g * n
    p_y_norm += i_g * n
    p_near += (i_g * tl.cdiv(n, MARKED) + i_own // MARKED) * tl.cdiv(n, BN)
    b_e1 = tl.zeros([BM], dtype=tl.float64)
    b_f1 = tl.zeros([BM], dtype=tl.float64)
    b_ef = tl.zeros([BM], dtype=tl.float64)
    b_ee = tl.zeros([BM], dtype=tl.float64)
    b_ff = tl.zeros([BM], dtype=tl.float64)
    for i in range(begin, end, BN):
        o_oth = i + tl.arange(0, BN)
        m = (o_oth < n)[None, :]
        if DIRECT:
            if tl.load(p_near + i // BN) != 0:
                p_xg = p_x_given + i_g * n * DX
                p_yg = p_y_given + i_g * n * DY
                b_rx = difference_tile(p_xg, tl.load(p_x_scale + i_g), o_own, o_oth, n, n, DX, ACC, BM, BN)
                b_ry = difference_tile(p_yg, tl.load(p_y_scale + i_g), o_own, o_oth, n, n, DY, ACC, BM, BN)
                e1, f1, ef, ee, ff = row_sums(b_rx, b_ry, m, TERMS)
                b_e1 += e1
                b_f1 += f1
                b_ef += ef
                b_ee += ee
                b_ff += ff
        else:
            b_rx, near_x = side_tile(p_x, p_x_norm, o_own, o_oth, n, n, DX, ACC, EPS, PRECISION, BM, BN, BK)
            b_ry, near_y = side_tile(p_y, p_y_norm, o_own, o_oth, n, n, DY, ACC, EPS, PRECISION, BM, BN, BK)
            near = near_x | near_y
            tl.store(p_near + i // BN, near.to(tl.int8))
            e1, f1, ef, ee, ff = row_sums(b_rx, b_ry, m & (near == 0), TERMS)
            b_e1 += e1
            b_f1 += f1
            b_ef += ef
            b_ee += ee
            b_ff += ff
    m_own = o_own < n
    i_slot = n_slots - 1 if DIRECT else i_split
    p_sums += (i_g * n_slots + i_slot) * SUMS * n + o_own
    tl.store(p_sums, b_e1, mask=m_own)
    tl.store(p_sums + n, b_f1, mask=m_own)
    tl.store(p_sums + 2 * n, b_ef, mask=m_own)
    tl.store(p_sums + 3 * n, b_ee, mask=m_own)
    tl.store(p_sums + 4 * n, b_ff, mask=m_own)


@triton.jit(do_not_specialize=["n", "first", "n_own", "n_splits", "n_slots"])
def hsic_grad_kernel(
    p_x, p_y, p_x_norm, p_y_norm, p_x_given, p_y_given, p_x_scale, p_y_scale, p_own_mean, p_mean, p_g, p_near,
    p_slope_x, p_slope_y, p_sums, p_dx, p_dy,
    n, DX, DY, first, n_own, n_splits, n_slots,
    EPS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, MARKED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n_own against a range of columns. p_sums [G, n_slots, 4, n_own]: row sums of the slopes of
    x and of y, and what the rows add to the gradients of both bandwidths, the last slot by DIRECT; p_slope_x, p_slope_y
    [G, n_own, n], or p_dx, p_dy, to which DIRECT adds."""
    ACC: tl.constexpr = p_x_norm.dtype.element_ty
    i_g, i_split, i_own, begin, end = place(n_own, n_splits, n, BM, BN)
    o_chunk = i_own + tl.arange(0, BM)
    o_own = first + o_chunk
    n_end = first + n_own
    scale_x = tl.load(p_x_scale + i_g)
    scale_y = tl.load(p_y_scale + i_g)
    p_g += i_g * 3
    p_x += i_g * n * DX
    p_y += i_g * n * DY
    p_x_norm += i_g * n
    p_y_norm += i_g * n
    p_own_mean += i_g * 4 * n
    p_mean += i_g * 4 * n
    p_near += (i_g * tl.cdiv(n_own, MARKED) + i_own // MARKED) * tl.cdiv(n, BN)
    b_sx = tl.zeros([BM], dtype=ACC)
    b_sy = tl.zeros([BM], dtype=ACC)
    b_dwx = tl.zeros([BM], dtype=tl.float64)
    b_dwy = tl.zeros([BM], dtype=tl.float64)
    o_o = tl.arange(0, BO)
    b_dx = tl.zeros([BM, BO], dtype=ACC)
    b_dy = tl.zeros([BM, BO], dtype=ACC)
    for i in range(begin, end, BN):
        o_oth = i + tl.arange(0, BN)
        m = (o_own < n_end)[:, None] & (o_oth < n)[None, :]
        if DIRECT:
            if tl.load(p_near + i // BN) != 0:
                p_xg = p_x_given + i_g * n * DX
                p_yg = p_y_given + i_g * n * DY
                b_rx = difference_tile(p_xg, scale_x, o_own, o_oth, n_end, n, DX, ACC, BM, BN)
                b_ry = difference_tile(p_yg, scale_y, o_own, o_oth, n_end, n, DY, ACC, BM, BN)
                b_ax, b_ay = slopes(b_rx, b_ry, m, p_own_mean, p_mean, p_g, o_own, o_oth, n_end, n, TERMS)
                b_dwx += tl.sum(b_ax * b_rx, 1).to(tl.float64)
                b_dwy += tl.sum(b_ay * b_ry, 1).to(tl.float64)
                if p_dx is not None:
                    b_ax *= -2.0 * scale_x
                    add_along_differences(b_ax, p_xg, p_dx + i_g * n * DX, scale_x, o_own, o_oth, n_end, n, DX)
                if p_dy is not None:
                    b_ay *= -2.0 * scale_y
                    add_along_differences(b_ay, p_yg, p_dy + i_g * n * DY, scale_y, o_own, o_oth, n_end, n, DY)
        else:
            b_rx, near_x = side_tile(p_x, p_x_norm, o_own, o_oth, n_end, n, DX, ACC, EPS, PRECISION, BM, BN, BK)
            b_ry, near_y = side_tile(p_y, p_y_norm, o_own, o_oth, n_end, n, DY, ACC, EPS, PRECISION, BM, BN, BK)
            near = near_x | near_y
            tl.store(p_near + i // BN, near.to(tl.int8))
            b_rx = tl.where(near != 0, 0.0, b_rx)
            b_ry = tl.where(near != 0, 0.0, b_ry)
            m = m & (near == 0)
            b_ax, b_ay = slopes(b_rx, b_ry, m, p_own_mean, p_mean, p_g, o_own, o_oth, n_end, n, TERMS)
            b_dwx += tl.sum(b_ax * b_rx, 1).to(tl.float64)
            b_dwy += tl.sum(b_ay * b_ry, 1).to(tl.float64)
            b_ax = without_own(b_ax * (-2.0 * scale_x), o_own, o_oth)
            b_ay = without_own(b_ay * (-2.0 * scale_y), o_own, o_oth)
            b_sx += tl.sum(b_ax, 1)
            b_sy += tl.sum(b_ay, 1)
            o_slope = (i_g * n_own + o_chunk[:, None]) * n + o_oth[None, :]
            m_stored = (o_own < n_end)[:, None] & (o_oth < n)[None, :]
            if p_slope_x is not None:
                tl.store(p_slope_x + o_slope, b_ax, mask=m_stored)
            if p_slope_y is not None:
                tl.store(p_slope_y + o_slope, b_ay, mask=m_stored)
            if p_dx is not None:
                b_dx = mma(b_ax, load_tile(p_x, o_oth, o_o, n, DX), b_dx, ACC, PRECISION)
            if p_dy is not None:
                b_dy = mma(b_ay, load_tile(p_y, o_oth, o_o, n, DY), b_dy, ACC, PRECISION)
    m_own = o_chunk < n_own
    i_slot = n_slots - 1 if DIRECT else i_split
    p_sums += (i_g * n_slots + i_slot) * 4 * n_own + o_chunk
    tl.store(p_sums, b_sx.to(tl.float64), mask=m_own)
    tl.store(p_sums + n_own, b_sy.to(tl.float64), mask=m_own)
    tl.store(p_sums + 2 * n_own, b_dwx * scale_x, mask=m_own)
    tl.store(p_sums + 3 * n_own, b_dwy * scale_y, mask=m_own)
    if not DIRECT:
        o_row = i_g * n + o_own[:, None]
        if p_dx is not None:
            b_dx = b_sx[:, None] * load_tile(p_x, o_own, o_o, n_end, DX) - b_dx
            tl.store(p_dx + o_row * DX + o_o[None, :], b_dx, mask=m_own[:, None] & (o_o < DX)[None, :])
        if p_dy is not None:
            b_dy = b_sy[:, None] * load_tile(p_y, o_own, o_o, n_end, DY) - b_dy
            tl.store(p_dy + o_row * DY + o_o[None, :], b_dy, mask=m_own[:, None] & (o_o < DY)[None, :])


def _settings(t: Tiling, dtype: torch.dtype, direct: bool) -> dict:
    here = direct_tiling(t) if direct else t
    settings = {"BM": here.BM, "BN": t.BN, "BK": t.BK, "num_warps": here.num_warps, "num_stages": t.num_stages}
    return {**settings, **constants(dtype), "MARKED": t.BM, "DIRECT": direct, "enable_fp_fusion": True}


class _Pair:
    """Both samples as kernels take them: about their mean in units of their bandwidth, and as they were given."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, sx: torch.Tensor, sy: torch.Tensor):
        self.dtype = accumulate_dtype(x.dtype)
        self.given = tuple(t.to(self.dtype).contiguous() for t in (x, y))
        self.scale = tuple(s.to(self.dtype).reciprocal() for s in (sx, sy))
        self.about = tuple(about_mean(t, s) for t, s in zip(self.given, self.scale, strict=True))
        norms = (t.square().sum(-1) for t in self.about)
        self.arguments = (*self.about, *norms, *self.given, *self.scale)
        (self.G, self.B, self.DX), self.DY = x.shape, y.shape[2]


def forward(
    x: torch.Tensor, y: torch.Tensor, sx: torch.Tensor, sy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of EF, EE and FF [G, 3] and row sums of E and F [G, 2, B], both fp64."""
    check("rbf_hsic", INTERPRETED, x, y)
    p = _Pair(x, y, sx, sy)
    t = tiling(p.dtype, p.DX, INTERPRETED, False, 2, hopper(x.device))
    splits = split(p.G, p.B, p.B, t)
    sums = torch.empty((p.G, splits + 1, SUMS.value, p.B), dtype=torch.float64, device=x.device)
    near = marks(p.G, p.B, p.B, t, x)
    with device_guard(x):
        for direct, ranges in ((False, splits), (True, 1)):
            settings = _settings(t, p.dtype, direct)
            hsic_kernel[(p.G * ranges * triton.cdiv(p.B, settings["BM"]),)](
                *p.arguments, near, sums, p.B, p.DX, p.DY, ranges, splits + 1, **settings
            )
    found = sums.sum(1)
    return found[:, 2:].sum(-1), found[:, :2].contiguous()


def backward(
    x: torch.Tensor,
    y: torch.Tensor,
    sx: torch.Tensor,
    sy: torch.Tensor,
    rows: torch.Tensor,
    g: torch.Tensor,
    needs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, y and bandwidths under g [G, 3], empty where `needs` does not ask; row sums from `forward`."""
    check("rbf_hsic", INTERPRETED, x, y)
    p = _Pair(x, y, sx, sy)
    means = rows / p.B
    constant = (
        *p.arguments, _two_summands(means - means.mean(-1, keepdim=True), p.dtype), _two_summands(means, p.dtype),
        (g / p.B**2).to(p.dtype).contiguous(),
    )  # fmt: skip
    wanted = (needs & NEED_X, needs & NEED_Y)
    out = tuple(torch.empty_like(t) if need else None for t, need in zip(p.about, wanted, strict=True))
    dwidth = g.new_zeros((2, p.G))
    t = tiling(p.dtype, max(p.DX, p.DY), INTERPRETED, True, 2, hopper(x.device))
    fused = max(p.DX, p.DY) <= t.BO
    with device_guard(x):
        steps = [(0, p.B)] if fused else chunks(2 * p.G, p.B, p.B, p.about[0].element_size(), t.BM)
        for first, count in steps:
            dwidth += _chunk(p, constant, t, first, count, out, fused)
    return (
        x.new_empty(0) if out[0] is None else out[0].to(x.dtype),
        y.new_empty(0) if out[1] is None else out[1].to(y.dtype),
        dwidth[0].to(sx.dtype) if needs & NEED_BANDWIDTH else sx.new_empty(0),
        dwidth[1].to(sy.dtype) if needs & NEED_BANDWIDTH_Y else sy.new_empty(0),
    )


def _two_summands(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[G, 2, B] in fp64 -> [G, 2, 2, B]: rounded to `dtype`, and what that leaves."""
    high = t.to(dtype)
    return torch.stack([high, (t - high).to(dtype)], 2)


def _chunk(
    p: _Pair, constant: tuple, t: Tiling, first: int, count: int, out: tuple[torch.Tensor | None, ...], fused: bool
) -> torch.Tensor:
    """Writes these rows of the gradients `out` of x and y; returns what they add to both bandwidths', [2, G]."""
    some = out[0] is not None or out[1] is not None
    splits = 1 if fused and some else split(p.G, count, p.B, t)
    new = lambda *shape, dtype=p.dtype: torch.empty((p.G, *shape), dtype=dtype, device=p.about[0].device)  # noqa: E731
    slopes = tuple(None if d is None or fused else new(count, p.B) for d in out)
    sums, near = new(splits + 1, 4, count, dtype=torch.float64), marks(p.G, count, p.B, t, p.about[0])

    def launch(ranges: int, slopes: tuple, out: tuple, direct: bool) -> None:
        settings = _settings(t, p.dtype, direct)
        hsic_grad_kernel[(p.G * ranges * triton.cdiv(count, settings["BM"]),)](
            *constant, near, *slopes, sums, *out, p.B, p.DX, p.DY, first, count, ranges, splits + 1, BO=t.BO, **settings
        )

    launch(splits, slopes, out if fused else (None, None), False)
    part = slice(first, first + count)
    for i, (about, slope, gradient) in enumerate(zip(p.about, slopes, out, strict=True)):
        if slope is not None and gradient is not None:
            slope_sum = sums[:, :splits, i].sum(1)[..., None].to(p.dtype)
            torch.mul(slope_sum, about[:, part], out=gradient[:, part])
            gradient[:, part] -= torch.bmm(slope, about)
    launch(1, (None, None), out, True)
    return sums[:, :, 2:].sum((1, 3)).T
