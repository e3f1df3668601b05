"""HSIC's sums over pairs in Triton, and their gradients by recomputation (hsic.py has the formulas).

Forward, one pass over the pairs: row sums of E and F and of the products EF, EE and FF, written by the row's owner.
Backward, one pass: with He_ij = E_ij - e_i - e_j + e (e_i the mean of row i, e of all) and Hf likewise,

    A_ij = (g_0 Hf_ij + 2 g_1 He_ij) (E_ij + 1),   W = -4 gamma_x A,   s_i = sum_j W_ij
    dx_i = s_i x_i - sum_j W_ij x_j,   dgamma_x = -sum A r^2;   y likewise

2 B^2 (Dx + Dy) FLOP forward, twice that backward, O(B D) memory: features wider than BO go through a slope buffer of at
most CHUNK_BYTES (one row tile at least) and a matmul.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, dot_tile, load_tile, load_vector, mma
from .schema import NEED_GAMMA, NEED_GAMMA_Y, NEED_X, NEED_Y
from .triton_common import INTERPRETED, Tiling, check, chunks, constants, distance_tile, expm1, place, split, tiling

SUMS = tl.constexpr(5)


@triton.jit
def side_tile(p, p_norm, gamma, o_own, o_oth, n_own, n, D, ACC: tl.constexpr, EPS: tl.constexpr, TERMS: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Squared distances and e of one side's rows against its columns: [BM, BN] each."""
    b_dot = dot_tile(p, p, o_own, o_oth, n_own, n, D, ACC, "ieee", BM, BN, BK)
    b_own_norm = load_vector(p_norm, o_own, n_own, 0.0)  # [BM]
    b_r = distance_tile(b_dot, b_own_norm, load_vector(p_norm, o_oth, n, 0.0), o_own, o_oth, EPS)
    return b_r, expm1(-gamma * b_r, TERMS)


@triton.jit
def centred_tile(b_e, p_own, p_oth, o_own, o_oth, n_own, n):
    """e less the means of its row and of its column, plus that of all: [BM, BN]. Means come as two summands each: the
    rounding of one would be the same all along a row, and add up in the gradients."""
    b_he = b_e - load_vector(p_own, o_own, n_own, 0.0)[:, None] - load_vector(p_oth, o_oth, n, 0.0)[None, :]
    b_rest = load_vector(p_own + n, o_own, n_own, 0.0)[:, None] + load_vector(p_oth + n, o_oth, n, 0.0)[None, :]
    return b_he - b_rest


@triton.jit(do_not_specialize=["n", "n_splits"])
def hsic_kernel(
    p_x, p_y, p_x_norm, p_y_norm, p_gx, p_gy, p_sums, n, DX, DY, n_splits,
    EPS: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Row sums of E, F, EF, EE and FF over a range of columns: [G, n_splits, SUMS, n]."""
    ACC: tl.constexpr = p_x_norm.dtype.element_ty
    i_g, i_split, i_own, begin, end = place(n, n_splits, n, BM, BN)
    o_own = i_own + tl.arange(0, BM)
    gx = tl.load(p_gx + i_g)
    gy = tl.load(p_gy + i_g)
    p_x += i_g * n * DX
    p_y += i_g * n * DY
    p_x_norm += i_g * n
    p_y_norm += i_g * n
    b_e1 = tl.zeros([BM], dtype=tl.float64)
    b_f1 = tl.zeros([BM], dtype=tl.float64)
    b_ef = tl.zeros([BM], dtype=tl.float64)
    b_ee = tl.zeros([BM], dtype=tl.float64)
    b_ff = tl.zeros([BM], dtype=tl.float64)
    for i in range(begin, end, BN):
        o_oth = i + tl.arange(0, BN)
        m = (o_oth < n)[None, :]
        _, b_e = side_tile(p_x, p_x_norm, gx, o_own, o_oth, n, n, DX, ACC, EPS, TERMS, BM, BN, BK)
        _, b_f = side_tile(p_y, p_y_norm, gy, o_own, o_oth, n, n, DY, ACC, EPS, TERMS, BM, BN, BK)
        b_e = tl.where(m, b_e, 0.0)
        b_f = tl.where(m, b_f, 0.0)
        b_e1 += tl.sum(b_e, 1).to(tl.float64)
        b_f1 += tl.sum(b_f, 1).to(tl.float64)
        b_ef += tl.sum(b_e * b_f, 1).to(tl.float64)
        b_ee += tl.sum(b_e * b_e, 1).to(tl.float64)
        b_ff += tl.sum(b_f * b_f, 1).to(tl.float64)
    m_own = o_own < n
    p_sums += (i_g * n_splits + i_split) * SUMS * n + o_own
    tl.store(p_sums, b_e1, mask=m_own)
    tl.store(p_sums + n, b_f1, mask=m_own)
    tl.store(p_sums + 2 * n, b_ef, mask=m_own)
    tl.store(p_sums + 3 * n, b_ee, mask=m_own)
    tl.store(p_sums + 4 * n, b_ff, mask=m_own)


@triton.jit(do_not_specialize=["n", "first", "n_own", "n_splits"])
def hsic_grad_kernel(
    p_x, p_y, p_x_norm, p_y_norm, p_gx, p_gy, p_own_mean, p_mean, p_g,
    p_slope_x, p_slope_y, p_sums, p_dx, p_dy,
    n, DX, DY, first, n_own, n_splits,
    EPS: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n_own against a range of columns. p_sums [G, n_splits, 4, n_own]: row sums of the slopes of
    x and of y, and what the rows add to dgamma_x and dgamma_y; p_slope_x, p_slope_y [G, n_own, n], or p_dx, p_dy."""
    ACC: tl.constexpr = p_x_norm.dtype.element_ty
    i_g, i_split, i_own, begin, end = place(n_own, n_splits, n, BM, BN)
    o_chunk = i_own + tl.arange(0, BM)
    o_own = first + o_chunk
    n_end = first + n_own
    gx = tl.load(p_gx + i_g)
    gy = tl.load(p_gy + i_g)
    g_xy = tl.load(p_g + i_g * 3)
    g_xx = 2.0 * tl.load(p_g + i_g * 3 + 1)
    g_yy = 2.0 * tl.load(p_g + i_g * 3 + 2)
    p_x += i_g * n * DX
    p_y += i_g * n * DY
    p_x_norm += i_g * n
    p_y_norm += i_g * n
    p_own_mean += i_g * 4 * n
    p_mean += i_g * 4 * n
    b_sx = tl.zeros([BM], dtype=ACC)
    b_sy = tl.zeros([BM], dtype=ACC)
    b_dgx = tl.zeros([BM], dtype=tl.float64)
    b_dgy = tl.zeros([BM], dtype=tl.float64)
    o_o = tl.arange(0, BO)
    b_dx = tl.zeros([BM, BO], dtype=ACC)
    b_dy = tl.zeros([BM, BO], dtype=ACC)
    for i in range(begin, end, BN):
        o_oth = i + tl.arange(0, BN)
        m = (o_own < n_end)[:, None] & (o_oth < n)[None, :]
        b_rx, b_e = side_tile(p_x, p_x_norm, gx, o_own, o_oth, n_end, n, DX, ACC, EPS, TERMS, BM, BN, BK)
        b_ry, b_f = side_tile(p_y, p_y_norm, gy, o_own, o_oth, n_end, n, DY, ACC, EPS, TERMS, BM, BN, BK)
        b_he = centred_tile(b_e, p_own_mean, p_mean, o_own, o_oth, n_end, n)  # [BM, BN]
        b_hf = centred_tile(b_f, p_own_mean + 2 * n, p_mean + 2 * n, o_own, o_oth, n_end, n)
        b_ax = tl.where(m, (g_xy * b_hf + g_xx * b_he) * (b_e + 1.0), 0.0)
        b_ay = tl.where(m, (g_xy * b_he + g_yy * b_hf) * (b_f + 1.0), 0.0)
        b_dgx += tl.sum(b_ax * b_rx, 1).to(tl.float64)
        b_dgy += tl.sum(b_ay * b_ry, 1).to(tl.float64)
        b_ax *= -4.0 * gx
        b_ay *= -4.0 * gy
        b_sx += tl.sum(b_ax, 1)
        b_sy += tl.sum(b_ay, 1)
        o_slope = (i_g * n_own + o_chunk[:, None]) * n + o_oth[None, :]
        if p_slope_x is not None:
            tl.store(p_slope_x + o_slope, b_ax, mask=m)
        if p_slope_y is not None:
            tl.store(p_slope_y + o_slope, b_ay, mask=m)
        if p_dx is not None:
            b_dx = mma(b_ax, load_tile(p_x, o_oth, o_o, n, DX), b_dx, ACC, "ieee")
        if p_dy is not None:
            b_dy = mma(b_ay, load_tile(p_y, o_oth, o_o, n, DY), b_dy, ACC, "ieee")
    m_own = o_chunk < n_own
    p_sums += (i_g * n_splits + i_split) * 4 * n_own + o_chunk
    tl.store(p_sums, b_sx.to(tl.float64), mask=m_own)
    tl.store(p_sums + n_own, b_sy.to(tl.float64), mask=m_own)
    tl.store(p_sums + 2 * n_own, b_dgx, mask=m_own)
    tl.store(p_sums + 3 * n_own, b_dgy, mask=m_own)
    o_row = i_g * n + o_own[:, None]
    if p_dx is not None:
        b_dx = b_sx[:, None] * load_tile(p_x, o_own, o_o, n_end, DX) - b_dx
        tl.store(p_dx + o_row * DX + o_o[None, :], b_dx, mask=m_own[:, None] & (o_o < DX)[None, :])
    if p_dy is not None:
        b_dy = b_sy[:, None] * load_tile(p_y, o_own, o_o, n_end, DY) - b_dy
        tl.store(p_dy + o_row * DY + o_o[None, :], b_dy, mask=m_own[:, None] & (o_o < DY)[None, :])


def _settings(t: Tiling, dtype: torch.dtype) -> dict:
    settings = {"BM": t.BM, "BN": t.BN, "BK": t.BK, "num_warps": t.num_warps, "num_stages": t.num_stages}
    return {**settings, **constants(dtype), "enable_fp_fusion": True}


def forward(
    x: torch.Tensor, y: torch.Tensor, gx: torch.Tensor, gy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of EF, EE and FF [G, 3] and row sums of E and F [G, 2, B], both fp64."""
    check("rbf_hsic", INTERPRETED, x, y)
    dtype, (G, B, DX) = accumulate_dtype(x.dtype), x.shape
    x, y, gx, gy = (t.to(dtype).contiguous() for t in (x, y, gx, gy))
    t = tiling(dtype, DX, INTERPRETED, False)
    splits = split(G, B, B, t)
    sums = torch.empty((G, splits, SUMS.value, B), dtype=torch.float64, device=x.device)
    with device_guard(x):
        hsic_kernel[(G * splits * triton.cdiv(B, t.BM),)](
            x, y, x.square().sum(-1), y.square().sum(-1), gx, gy, sums, B, DX, y.shape[2], splits,
            **_settings(t, dtype),
        )  # fmt: skip
    found = sums.sum(1) if splits > 1 else sums[:, 0]
    return found[:, 2:].sum(-1), found[:, :2].contiguous()


def backward(
    x: torch.Tensor,
    y: torch.Tensor,
    gx: torch.Tensor,
    gy: torch.Tensor,
    rows: torch.Tensor,
    g: torch.Tensor,
    needs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, y and both gammas under g [G, 3], empty where `needs` does not ask; row sums from `forward`."""
    check("rbf_hsic", INTERPRETED, x, y)
    dtype, (G, B, DX), DY = accumulate_dtype(x.dtype), x.shape, y.shape[2]
    a, b = x.to(dtype).contiguous(), y.to(dtype).contiguous()
    means = rows / B
    problem = (
        a, b, a.square().sum(-1), b.square().sum(-1), gx.to(dtype), gy.to(dtype),
        _two_summands(means - means.mean(-1, keepdim=True), dtype), _two_summands(means, dtype),
        (g / B**2).to(dtype).contiguous(),
    )  # fmt: skip
    want = (a if needs & NEED_X else None, b if needs & NEED_Y else None)
    da, db = (None if t is None else torch.empty_like(t) for t in want)
    dgamma = g.new_zeros((2, G))
    t = tiling(dtype, max(DX, DY), INTERPRETED, True)
    with device_guard(x):
        if t.BO >= max(DX, DY):
            dgamma -= _launch(problem, t, 0, B, None, None, da, db)[:, 2:].sum(-1).T
        else:
            for first, count in chunks(2 * G, B, B, a.element_size(), t.BM):
                dgamma -= _chunk(problem, t, first, count, da, db)
    return (
        x.new_empty(0) if da is None else da.to(x.dtype),
        y.new_empty(0) if db is None else db.to(y.dtype),
        dgamma[0].to(gx.dtype) if needs & NEED_GAMMA else gx.new_empty(0),
        dgamma[1].to(gy.dtype) if needs & NEED_GAMMA_Y else gy.new_empty(0),
    )


def _two_summands(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[G, 2, B] in fp64 -> [G, 2, 2, B]: rounded to `dtype`, and what that leaves."""
    high = t.to(dtype)
    return torch.stack([high, (t - high).to(dtype)], 2)


def _launch(problem: tuple, t: Tiling, first: int, count: int, slope_x, slope_y, dx, dy) -> torch.Tensor:
    """Row sums [G, 4, count] in fp64: of both slopes, and of both dgamma's terms."""
    x, y = problem[:2]
    G, B, DX = x.shape
    fused = slope_x is None and slope_y is None and not (dx is None and dy is None)
    splits = 1 if fused else split(G, count, B, t)
    sums = torch.empty((G, splits, 4, count), dtype=torch.float64, device=x.device)
    hsic_grad_kernel[(G * splits * triton.cdiv(count, t.BM),)](
        *problem, slope_x, slope_y, sums, dx, dy, B, DX, y.shape[2], first, count, splits,
        BO=t.BO, **_settings(t, x.dtype),
    )  # fmt: skip
    return sums.sum(1)


def _chunk(problem: tuple, t: Tiling, first: int, count: int, dx, dy) -> torch.Tensor:
    """Writes these rows of dx and dy; returns what they add to both dgammas, [2, G]."""
    x, y = problem[:2]
    shape = (x.shape[0], count, x.shape[1])
    slopes = [None if d is None else torch.empty(shape, dtype=x.dtype, device=x.device) for d in (dx, dy)]
    sums = _launch(problem, t, first, count, slopes[0], slopes[1], None, None)
    part = slice(first, first + count)
    for i, (side, slope, out) in enumerate(zip((x, y), slopes, (dx, dy), strict=True)):
        if slope is not None:
            torch.mul(sums[:, i, :, None].to(x.dtype), side[:, part], out=out[:, part])
            out[:, part] -= torch.bmm(slope, side)
    return sums[:, 2:].sum(-1).T
