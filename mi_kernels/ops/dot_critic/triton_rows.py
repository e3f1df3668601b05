"""Row-wise kernels of a loss, one launch each: normalisation of rows, its backward pass, and the sum of the loss.

    u = x / max(|x|, 1e-12),   dx = (du - u <u, du>) / max(|x|, 1e-12)
    loss = sum_i (w_row row_lse_i + w_soft row_softplus_i - w_pos S_i,pos(i)) + w_col sum_j col_lse_j

x and y share a launch, because launch overhead dominates at small batches. O((B + N) D) FLOP; each tensor is read at
most twice (the second time from cache) and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.dtypes import accumulate_dtype
from ..common.triton import device_guard, load_tile, load_vector, next_power

_EPS = tl.constexpr(1e-12)  # as F.normalize


@triton.jit
def inverse_norm(p, o_n, n, D, ACC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """1 / max(|row|, eps) of rows o_n, and whether a row is longer than eps: [BM] each."""
    b_sum = tl.zeros([BM], dtype=ACC)
    for i in range(0, D, BD):
        b = load_tile(p, o_n, i + tl.arange(0, BD), n, D).to(ACC)  # [BM, BD]
        b_sum += tl.sum(b * b, 1)
    b_norm = tl.sqrt(b_sum)
    return 1.0 / tl.maximum(b_norm, _EPS), b_norm > _EPS


@triton.jit
def unit_rows(p, p_out, o_n, n, D, ACC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    b_inverse, _ = inverse_norm(p, o_n, n, D, ACC, BM, BD)
    for i in range(0, D, BD):
        o_d = i + tl.arange(0, BD)
        b = load_tile(p, o_n, o_d, n, D).to(ACC) * b_inverse[:, None]
        m = (o_n < n)[:, None] & (o_d < D)[None, :]
        tl.store(p_out + o_n.to(tl.int64)[:, None] * D + o_d[None, :], b.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def rows_back(p, p_g, p_out, o_n, n, D, ACC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    b_inverse, m_long = inverse_norm(p, o_n, n, D, ACC, BM, BD)
    b_dot = tl.zeros([BM], dtype=ACC)
    for i in range(0, D, BD):
        o_d = i + tl.arange(0, BD)
        b_u = load_tile(p, o_n, o_d, n, D).to(ACC) * b_inverse[:, None]
        b_dot += tl.sum(b_u * load_tile(p_g, o_n, o_d, n, D).to(ACC), 1)
    b_dot = tl.where(m_long, b_dot, 0.0)
    for i in range(0, D, BD):
        o_d = i + tl.arange(0, BD)
        b_u = load_tile(p, o_n, o_d, n, D).to(ACC) * b_inverse[:, None]
        b = (load_tile(p_g, o_n, o_d, n, D).to(ACC) - b_u * b_dot[:, None]) * b_inverse[:, None]
        m = (o_n < n)[:, None] & (o_d < D)[None, :]
        tl.store(p_out + o_n.to(tl.int64)[:, None] * D + o_d[None, :], b.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n_x", "n_y"])
def normalize_kernel(p_x, p_y, p_x_out, p_y_out, n_x, n_y, D, ACC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    n_tiles = tl.cdiv(n_x, BM)
    pid = tl.program_id(0)
    if pid < n_tiles:
        unit_rows(p_x, p_x_out, pid * BM + tl.arange(0, BM), n_x, D, ACC, BM, BD)
    else:
        unit_rows(p_y, p_y_out, (pid - n_tiles) * BM + tl.arange(0, BM), n_y, D, ACC, BM, BD)


@triton.jit(do_not_specialize=["n_x", "n_y"])
def normalize_back_kernel(
    p_x, p_y, p_x_g, p_y_g, p_x_out, p_y_out, n_x, n_y, D, ACC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    n_tiles = tl.cdiv(n_x, BM)
    pid = tl.program_id(0)
    if pid < n_tiles:
        if p_x_out is not None:
            rows_back(p_x, p_x_g, p_x_out, pid * BM + tl.arange(0, BM), n_x, D, ACC, BM, BD)
    else:
        if p_y_out is not None:
            rows_back(p_y, p_y_g, p_y_out, (pid - n_tiles) * BM + tl.arange(0, BM), n_y, D, ACC, BM, BD)


@triton.jit(do_not_specialize=["n_row", "n_col", "shift", "n_tiles"])
def sum_kernel(
    p_x, p_y, p_scale, p_row_bias, p_col_bias, p_row_lse, p_col_lse, p_soft, p_part,
    n_row, n_col, D, shift, n_tiles, w_row, w_col, w_soft, w_pos,
    POSITIVE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A summand of the loss for every BM rows and BM columns: [G, n_tiles] in fp64."""
    ACC: tl.constexpr = p_scale.dtype.element_ty
    i_g = tl.program_id(0).to(tl.int64) // n_tiles
    o_n = (tl.program_id(0) % n_tiles) * BM + tl.arange(0, BM)
    b_rows = tl.zeros([BM], dtype=ACC)
    if p_row_lse is not None:
        b_rows += w_row * load_vector(p_row_lse + i_g * n_row, o_n, n_row, 0.0)
    if p_soft is not None:
        b_rows += w_soft * load_vector(p_soft + i_g * n_row, o_n, n_row, 0.0)
    if POSITIVE:
        o_pos = (o_n + shift) % n_col
        b_dot = tl.zeros([BM], dtype=ACC)
        for i in range(0, D, BD):
            o_d = i + tl.arange(0, BD)
            b_x = load_tile(p_x + i_g * n_row * D, o_n, o_d, n_row, D).to(ACC)  # [BM, BD]
            b_y = load_tile(p_y + i_g * n_col * D, o_pos, o_d, n_col, D).to(ACC)
            b_dot += tl.sum(b_x * b_y, 1)
        b_s = b_dot * tl.load(p_scale + i_g)
        if p_row_bias is not None:
            b_s += load_vector(p_row_bias + i_g * n_row, o_n, n_row, 0.0)
        if p_col_bias is not None:
            b_s += load_vector(p_col_bias + i_g * n_col, o_pos, n_col, 0.0)
        b_rows -= w_pos * b_s
    b_sum = tl.where(o_n < n_row, b_rows, 0.0).to(tl.float64)
    if p_col_lse is not None:
        b_sum += (w_col * load_vector(p_col_lse + i_g * n_col, o_n, n_col, 0.0)).to(tl.float64)
    tl.store(p_part + tl.program_id(0), tl.sum(b_sum, 0))


INTERPRETED = not isinstance(sum_kernel, triton.runtime.JITFunction)


def blocks(D: int) -> tuple[int, int]:
    """BM rows and BD features of a tile. Rows that are not aligned take registers for their loads."""
    if INTERPRETED:
        return 8, 16
    BD = min(next_power(D, 16), 512)
    return max(1, (512 if D % 16 else 2048) // BD), BD


def _settings(D: int) -> dict:
    BM, BD = blocks(D)
    return {"BM": BM, "BD": BD, "num_warps": 4, "enable_fp_fusion": True}


def _acc(t: torch.Tensor):
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def _output(t: torch.Tensor) -> torch.Tensor:
    """The interpreter would cut off to bfloat16 instead of rounding; its results are rounded afterwards."""
    return torch.empty_like(t, dtype=torch.float32 if INTERPRETED and t.dtype == torch.bfloat16 else t.dtype)


def normalize(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unit length in the dtype of x and y, one launch. x [G, B, D], y [G, N, D], contiguous."""
    (n_x, n_y), D = (t.shape[0] * t.shape[1] for t in (x, y)), x.shape[2]
    BM, _ = blocks(D)
    out = _output(x), _output(y)
    with device_guard(x):
        normalize_kernel[(triton.cdiv(n_x, BM) + triton.cdiv(n_y, BM),)](
            x, y, *out, n_x, n_y, D, ACC=_acc(x), **_settings(D)
        )
    return out[0].to(x.dtype), out[1].to(y.dtype)


def normalize_back(
    x: torch.Tensor, y: torch.Tensor, gx: torch.Tensor | None, gy: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and y from those of their unit rows, in the accumulation type, one launch; None stays None."""
    (n_x, n_y), D = (t.shape[0] * t.shape[1] for t in (x, y)), x.shape[2]
    BM, _ = blocks(D)
    acc = accumulate_dtype(x.dtype)
    dx, dy = (None if g is None else torch.empty_like(t, dtype=acc) for t, g in ((x, gx), (y, gy)))
    with device_guard(x):
        normalize_back_kernel[(triton.cdiv(n_x, BM) + triton.cdiv(n_y, BM),)](
            x, y, gx, gy, dx, dy, n_x, n_y, D, ACC=_acc(x), **_settings(D)
        )
    return dx, dy


def total(
    x, y, scale, row_bias, col_bias, shift: int, stats: tuple, weights: tuple[float, float, float, float]
) -> torch.Tensor:
    """The loss [G] from row_lse, col_lse and row_softplus (each None or a tensor). One launch, two beyond one tile."""
    (G, B, D), N = x.shape, y.shape[1]
    BM, _ = blocks(D)
    w_row, w_col, w_soft, w_pos = weights
    n_tiles = triton.cdiv(max(B, N), BM)
    part = torch.empty((G, n_tiles), dtype=torch.float64, device=x.device)
    with device_guard(x):
        sum_kernel[(G * n_tiles,)](
            x, y, scale, row_bias, col_bias, *stats, part, B, N, D, max(shift, 0), n_tiles,
            float(w_row), float(w_col), float(w_soft), float(w_pos),
            POSITIVE=bool(w_pos) and shift >= 0, **_settings(D),
        )  # fmt: skip
    return part.sum(1, dtype=torch.float64).to(scale.dtype)
