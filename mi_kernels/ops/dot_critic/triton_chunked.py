"""One-sided losses of 16-bit features in row chunks: matmuls by torch, and one Triton kernel between them.

For every chunk of rows:  T = x_chunk y^T (fp32 out),  the kernel turns T into dS and the rows' statistics,
dx_chunk = scale dS y,  dy += scale dS^T x_chunk.  Gradients come with the loss, so nothing is computed twice: 3N FLOP,
N = 2 G B N D. A row is read twice by the kernel, from L2 the second time; dS is written in the features' dtype without
the loss's weight, so that its entries are probabilities, which fp16 resolves. Memory: a chunk of scores and of dS, at
most CHUNK_BYTES together (one row at least), and an fp32 dy. Deterministic: no atomics, chunks in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.triton import device_guard, sigmoid, softplus
from .schema import ALL, NEED_COL_BIAS, NEED_ROW_BIAS, NEED_SCALE, NEED_X, NEED_Y, OFF_DIAGONAL
from .triton_forward import lse_update

CHUNK_BYTES = 256 * 2**20
# 16-bit products that come out in fp32; before torch 2.8 scores would be rounded to 16 bits.
_WIDE_PRODUCTS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


@triton.jit(do_not_specialize=["n_row", "n_col", "first", "n_chunk", "shift"])
def epilogue_kernel(
    p_dot, p_scale, p_row_bias, p_ds, p_loss, p_ds_sum, p_ds_dot, n_row, n_col, first, n_chunk, shift, share,
    SOFT: tl.constexpr, SIGNED: tl.constexpr, OFF_DIAGONAL: tl.constexpr, POSITIVE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row of scores a program. p_loss: its log-sum-exp, or its sum of softplus, less `share` times the score of its
    positive; p_ds (None: not wanted): the derivative of that in each score, with its sum and its product with T."""
    ACC: tl.constexpr = p_scale.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // n_chunk
    i_row = (pid % n_chunk).to(tl.int32)
    row = first + i_row
    p_dot += pid * n_col
    b_scale = tl.load(p_scale + i_g)
    b_bias = tl.zeros([], dtype=ACC)
    if p_row_bias is not None:
        b_bias += tl.load(p_row_bias + i_g * n_row + row)
    positive = (row + shift) % n_col
    b_max = tl.full([1], -float("inf"), dtype=ACC)
    b_sum = tl.zeros([1], dtype=ACC)
    if not SOFT:
        for i in range(0, n_col, BN):
            o = i + tl.arange(0, BN)
            m = (o < n_col) & (o != row) if OFF_DIAGONAL else o < n_col
            b_s = tl.load(p_dot + o, mask=o < n_col, other=0.0) * b_scale + b_bias
            b_max, b_sum = lse_update(b_max, b_sum, tl.where(m, b_s, -float("inf"))[None, :])
    b_lse = b_max + tl.log(b_sum)  # [1]
    b_ref = tl.where(b_lse == -float("inf"), float("inf"), b_lse)  # no pairs: exp(S - inf) is 0
    b_soft = tl.zeros([BN], dtype=ACC)
    b_ds_sum = tl.zeros([BN], dtype=ACC)
    b_ds_dot = tl.zeros([BN], dtype=ACC)
    if SOFT or (p_ds is not None):
        for i in range(0, n_col, BN):
            o = i + tl.arange(0, BN)
            m = (o < n_col) & (o != row) if OFF_DIAGONAL else o < n_col
            b_dot = tl.load(p_dot + o, mask=o < n_col, other=0.0)
            b_s = b_dot * b_scale + b_bias
            if SOFT:
                b_sign = tl.where(o == positive, -1.0, 1.0) if SIGNED else tl.full([BN], 1.0, dtype=ACC)
                b_soft += tl.where(m, softplus(b_s * b_sign, 8), 0.0)
                b_ds = tl.where(m, sigmoid(b_s * b_sign) * b_sign, 0.0)
            else:
                b_ds = tl.where(m, tl.exp(b_s - b_ref), 0.0)
            if POSITIVE:
                b_ds -= tl.where(o == positive, share, 0.0)
            if p_ds is not None:
                tl.store(p_ds + pid * n_col + o, b_ds.to(p_ds.dtype.element_ty), mask=o < n_col)
                b_ds_sum += b_ds
                b_ds_dot += b_ds * b_dot
    b_loss = tl.sum(b_soft, 0) if SOFT else tl.sum(b_lse, 0)
    if POSITIVE:
        b_loss -= share * (tl.load(p_dot + positive) * b_scale + b_bias)
    o_row = i_g * n_row + row
    tl.store(p_loss + o_row, b_loss)
    if p_ds is not None:
        tl.store(p_ds_sum + o_row, tl.sum(b_ds_sum, 0))
        tl.store(p_ds_dot + o_row, tl.sum(b_ds_dot, 0))


INTERPRETED = not isinstance(epilogue_kernel, triton.runtime.JITFunction)


def columns(n_col: int) -> tuple[int, int]:
    """Columns a step and warps."""
    if INTERPRETED:
        return 16, 4
    return (2048, 8) if n_col > 1024 else (1024, 4)


def eligible(problem: tuple, w_row: float, w_col: float, w_soft: float) -> bool:
    """Whether this schedule computes the loss: one term over rows of 16-bit features, without ids or column biases."""
    x, _, _, _, col_bias, _, _, pairs, _ = problem
    short = x.dtype in (torch.bfloat16, torch.float16) and (_WIDE_PRODUCTS or not x.is_cuda)
    return short and not w_col and bool(w_row) != bool(w_soft) and col_bias is None and pairs in (ALL, OFF_DIAGONAL)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b [G, ., .] accumulated and returned in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _rows_of_chunk(G: int, B: int, N: int) -> int:
    step = max(1, CHUNK_BYTES // (6 * G * N))
    return min(B, step // 128 * 128 if step >= 128 else step)


def loss(
    problem: tuple, w_row: float, w_soft: float, w_pos: float, soft_signed: bool, needs: int
) -> tuple[torch.Tensor, ...]:
    """(loss [G], dx, dy, dscale, drow_bias, dcol_bias) as the operator dot_critic_loss has it; see `eligible`."""
    x, y, scale, row_bias, _, _, _, pairs, shift = problem
    (G, B, D), N = x.shape, y.shape[1]
    weight = w_row or w_soft
    share = w_pos / weight if shift >= 0 else 0.0
    rows = [torch.empty((G, B), dtype=torch.float32, device=x.device) for _ in range(3 if needs else 1)]
    dx = torch.empty_like(x, dtype=torch.float32) if needs & NEED_X else None
    dy = torch.zeros((G, N, D), dtype=torch.float32, device=x.device) if needs & NEED_Y else None
    step, (BN, warps) = _rows_of_chunk(G, B, N), columns(N)
    factor = (scale * weight)[:, None, None]
    for first in range(0, B, step):
        part = x[:, first : first + step]
        dot = _product(part, y.mT)
        ds = torch.empty(dot.shape, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device) if needs else None
        with device_guard(x):
            epilogue_kernel[(G * part.shape[1],)](
                dot, scale, row_bias, ds, *rows, *(None,) * (3 - len(rows)), B, N, first, part.shape[1], max(shift, 0),
                float(share), SOFT=bool(w_soft), SIGNED=soft_signed and shift >= 0, OFF_DIAGONAL=pairs == OFF_DIAGONAL,
                POSITIVE=bool(share), BN=BN, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        if ds is None:
            continue
        ds = ds.to(x.dtype)
        if dx is not None:
            dx[:, first : first + step] = _product(ds, y) * factor
        if dy is not None:
            dy += _product(ds.mT, part)
    value = rows[0].sum(1, dtype=torch.float64).mul_(weight).to(scale.dtype)
    return (
        value,
        scale.new_empty(0) if dx is None else dx,
        scale.new_empty(0) if dy is None else dy.mul_(factor),
        rows[2].sum(1) * weight if needs & NEED_SCALE else scale.new_empty(0),
        rows[1] * weight if needs & NEED_ROW_BIAS and row_bias is not None else scale.new_empty(0),
        scale.new_zeros((G, N)) if needs & NEED_COL_BIAS else scale.new_empty(0),
    )
