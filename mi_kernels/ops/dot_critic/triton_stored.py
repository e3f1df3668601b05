"""One-sided losses in row chunks: a Triton kernel writes dS, torch's matmuls turn it into gradients.

For every chunk of rows `slope_kernel` computes the scores of a tile and writes what the gradients need of them in the
features' type; scores never reach memory. Softplus losses: dS itself. A log-sum-exp, whose sum is not known before the
row ends:

    E_ij = exp(S_ij - k_i),   k_i = |scale| |x_i| max_j |y_j| - HEADROOM,   P = E / sum_j E

By Cauchy and Schwarz S_ij <= k_i + HEADROOM, so nothing overflows, and bfloat16 has fp32's exponents: E keeps the
precision of P down to 2^-126. `finish_kernel` adds up a row's sum, puts -share of the positive pair into E, and writes
x_i / sum_j E_ij. A row whose scores are all so far below the bound that its sum underflows (a cosine below about -0.15
with every key, at temperature 0.01) is done again there with its own maximum; nobody reads on the host whether there is
one. Then dx = (E y) / sum E and dy += E^T (x / sum E).

3N FLOP, N = 2 G B N D. Bytes beside the features': E is written once and read twice; every chunk reads and writes the
fp32 dy. Memory: E of a chunk (CHUNK_BYTES, or LEAST_ROWS rows), row sums of its tiles, an fp32 dy. Features of a width
that 16 does not divide are padded first, for the kernel's and the matmuls' 16-byte loads. Deterministic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..common.precision import WIDE_PRODUCTS, add_product, product
from ..common.triton import device_guard, dot_tile, hopper, load_tile, log1p_unit, precision
from .schema import ALL, NEED_COL_BIAS, NEED_ROW_BIAS, NEED_SCALE, NEED_X, NEED_Y, OFF_DIAGONAL
from .triton_common import GROUP, MOST_COLUMNS, SMALLEST, Tiling, place, rows_of_chunk
from .triton_forward import lse_update

_HEADROOM = tl.constexpr(44.0)  # nats: 2^63


@triton.jit
def offset_of(b_norm, top, scale):
    """k of rows with these norms; `top` is the largest norm of the columns."""
    return tl.abs(scale) * b_norm * top - _HEADROOM


@triton.jit(do_not_specialize=["n_row", "n_col", "first", "n_chunk", "shift"])
def slope_kernel(
    p_x, p_y, p_scale, p_row_bias, p_norm, p_top, p_ds, p_part, p_ds_part,
    n_row, n_col, D, first, n_chunk, shift, share,
    SOFT: tl.constexpr, SIGNED: tl.constexpr, OFF_DIAGONAL: tl.constexpr, POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dS (SOFT) or E of rows first .. first + n_chunk: p_ds [G, n_chunk, N], None where no gradient is wanted. p_part
    [G, n_chunk, column tiles]: each tile's row sums of softplus (less share S of the positive) or of E; p_ds_part:
    those of dS."""
    ACC: tl.constexpr = tl.float32
    i_g, i_row, i_col = place(n_chunk, n_col, BM, BN, GROUP)
    o_chunk = (i_row * BM).to(tl.int32) + tl.arange(0, BM)
    o_col = (i_col * BN).to(tl.int32) + tl.arange(0, BN)
    o_row, n_end = first + o_chunk, first + n_chunk
    p_x += i_g * n_row * D
    p_y += i_g * n_col * D
    b_dot = dot_tile(p_x, p_y, o_row, o_col, n_end, n_col, D, ACC, PRECISION, BM, BN, BK)  # [BM, BN]
    scale = tl.load(p_scale + i_g)
    m_in = (o_row < n_end)[:, None] & (o_col < n_col)[None, :]
    m = m_in
    if OFF_DIAGONAL:
        m = m & (o_row[:, None] != o_col[None, :])
    if SOFT:
        b_s = b_dot * scale
        if p_row_bias is not None:
            b_s += tl.load(p_row_bias + i_g * n_row + o_row, mask=o_row < n_end, other=0.0)[:, None]
        if POSITIVE or SIGNED:
            m_pos = ((o_row + shift) % n_col)[:, None] == o_col[None, :]
        b_z = tl.where(m_pos, -b_s, b_s) if SIGNED else b_s
        b_t = tl.exp(-tl.abs(b_z))  # of the sum and of the slope
        b_part = tl.where(m, tl.maximum(b_z, 0.0) + log1p_unit(b_t, 8), 0.0)
        b_ds = tl.where(m, tl.where(b_z >= 0, 1.0, b_t) / (1.0 + b_t), 0.0)
        if SIGNED:
            b_ds = tl.where(m_pos, -b_ds, b_ds)
        if POSITIVE:
            b_part -= tl.where(m_pos & m_in, share * b_s, 0.0)
            b_ds -= tl.where(m_pos & m_in, share, 0.0)
    else:
        b_norm = tl.load(p_norm + i_g * n_row + o_row, mask=o_row < n_end, other=0.0)
        b_k = offset_of(b_norm, tl.load(p_top + i_g), scale)
        b_ds = tl.where(m, tl.exp(b_dot * scale - b_k[:, None]), 0.0)
        b_part = b_ds
    n_cols = tl.cdiv(n_col, BN)
    o_part = (i_g * n_chunk + o_chunk) * n_cols + i_col
    tl.store(p_part + o_part, tl.sum(b_part, 1), mask=o_chunk < n_chunk)
    if p_ds_part is not None:
        tl.store(p_ds_part + o_part, tl.sum(b_ds, 1), mask=o_chunk < n_chunk)
    if p_ds is not None:
        p_ds += (i_g * n_chunk + i_row * BM) * n_col + i_col * BN
        o_tile = tl.arange(0, BM)[:, None] * n_col + tl.arange(0, BN)[None, :]  # 32 bits: half the registers
        tl.store(p_ds + o_tile, b_ds.to(p_ds.dtype.element_ty), mask=m_in)


@triton.jit
def row_dots(p_x, p_y, o_col, n_col, D, BN: tl.constexpr, BD: tl.constexpr):
    """<x, y_j> of one row with columns o_col, in fp32: [BN]."""
    b_dot = tl.zeros([BN], dtype=tl.float32)
    for i in range(0, D, BD):
        o_d = i + tl.arange(0, BD)
        b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BD]
        b_dot += tl.sum(load_tile(p_y, o_col, o_d, n_col, D).to(tl.float32) * b_x[None, :], 1)
    return b_dot


@triton.jit
def row_again(p_x, p_y, p_ds, row, n_col, D, scale, OFF_DIAGONAL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """The sum of a row's E about its own maximum, and that k; writes the row of E, if there is one."""
    b_max = tl.full([1], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([1], dtype=tl.float32)
    for i in range(0, n_col, BN):
        o = i + tl.arange(0, BN)
        m = (o < n_col) & (o != row) if OFF_DIAGONAL else o < n_col
        b_s = row_dots(p_x, p_y, o, n_col, D, BN, BD) * scale
        b_max, b_sum = lse_update(b_max, b_sum, tl.where(m, b_s, -float("inf"))[None, :])
    k = tl.sum(tl.where(b_max == -float("inf"), 0.0, b_max), 0)
    if p_ds is not None:
        for i in range(0, n_col, BN):
            o = i + tl.arange(0, BN)
            m = (o < n_col) & (o != row) if OFF_DIAGONAL else o < n_col
            b_e = tl.exp(row_dots(p_x, p_y, o, n_col, D, BN, BD) * scale - k)
            tl.store(p_ds + o, tl.where(m, b_e, 0.0).to(p_ds.dtype.element_ty), mask=o < n_col)
    return tl.sum(b_sum, 0), k


@triton.jit(do_not_specialize=["n_row", "n_col", "first", "n_chunk", "n_parts", "shift"])
def finish_kernel(
    p_x, p_y, p_scale, p_row_bias, p_norm, p_top, p_ds, p_part, p_loss, p_ds_sum, p_inverse, p_right,
    n_row, n_col, D, first, n_chunk, n_parts, shift, share,
    OFF_DIAGONAL: tl.constexpr, POSITIVE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A row a program. p_loss: its log-sum-exp less share S of its positive; with gradients E of the positive less
    share sum E, p_ds_sum the sum of dS, p_inverse 1 / sum E, and p_right [G, n_chunk, D] the row of x times that."""
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // n_chunk
    row = first + (pid % n_chunk).to(tl.int32)
    o_row = i_g * n_row + row
    p_x += o_row * D
    p_y += i_g * n_col * D
    if p_ds is not None:
        p_ds += pid * n_col
    scale = tl.load(p_scale + i_g)
    b_sum = tl.zeros([BP], dtype=tl.float32)
    for i in range(0, n_parts, BP):
        o = i + tl.arange(0, BP)
        b_sum += tl.load(p_part + pid * n_parts + o, mask=o < n_parts, other=0.0)
    total = tl.sum(b_sum, 0)
    k = offset_of(tl.load(p_norm + o_row), tl.load(p_top + i_g), scale)
    if total < SMALLEST:  # false for a NaN
        total, k = row_again(p_x, p_y, p_ds, row, n_col, D, scale, OFF_DIAGONAL, BN, BD)
    loss = k + tl.log(total)
    inside = tl.where(total == 0.0, 0.0, 1.0)  # 0: the row has no pairs, only its positive has a gradient
    total = tl.where(total == 0.0, 1.0, total)
    if p_row_bias is not None:
        loss += tl.load(p_row_bias + o_row)
    if POSITIVE:
        positive = (row + shift) % n_col
        b_pos = positive + tl.zeros([1], dtype=tl.int32)
        s = tl.sum(row_dots(p_x, p_y, b_pos, n_col, D, 1, BD), 0) * scale
        if p_ds is not None:
            e = tl.exp(s - k)
            if OFF_DIAGONAL:
                e = tl.where(positive == row, 0.0, e)
            tl.store(p_ds + positive, (e - share * total).to(p_ds.dtype.element_ty))
        if p_row_bias is not None:
            s += tl.load(p_row_bias + o_row)
        loss -= share * s
        inside -= share
    tl.store(p_loss + o_row, loss)
    if p_inverse is not None:
        tl.store(p_inverse + o_row, 1.0 / total)
        tl.store(p_ds_sum + o_row, inside)
    if p_right is not None:
        for i in range(0, D, BD):
            o_d = i + tl.arange(0, BD)
            b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32) / total
            tl.store(p_right + pid * D + o_d, b_x.to(p_right.dtype.element_ty), mask=o_d < D)


INTERPRETED = not isinstance(slope_kernel, triton.runtime.JITFunction)


def tiling(
    dtype: torch.dtype, tf32: bool, soft: bool, gradients: bool, wide: bool, interpreted: bool = False
) -> Tiling:
    """Block sizes of `slope_kernel`, free of register spills on sm_80 and sm_90. `wide`: from Hopper on."""
    if interpreted:
        return Tiling(32, 16, 16, 0, 4, 1)
    if dtype == torch.float32 and not tf32:
        return Tiling(64, 32, 16, 0, 4, 2)
    if dtype == torch.float32:
        return Tiling(128, 64 if soft else 128, 32, 0, 8, 3) if wide else Tiling(64, 64, 32, 0, 8, 2)
    return Tiling(128, 64 if soft else 256 if gradients and wide else 128, 64, 0, 8, 3)


def finish_blocks(D: int, interpreted: bool = False) -> dict[str, int]:
    if interpreted:
        return {"BN": 16, "BD": 16, "BP": 4}
    return {"BN": 16, "BD": min(triton.next_power_of_2(D), 256), "BP": 256}


def eligible(problem: tuple, w_row: float, w_col: float, w_soft: float) -> bool:
    """Whether this schedule computes the loss: one term over rows of 16- or 32-bit features, without ids or column
    biases. E of a log-sum-exp needs fp32's exponents."""
    x, y, _, _, col_bias, _, _, pairs, _ = problem
    if x.dtype == torch.float64 or (x.dtype == torch.float16 and w_row):
        return False
    if w_col or bool(w_row) == bool(w_soft) or col_bias is not None or y.shape[1] > MOST_COLUMNS:
        return False
    return pairs in (ALL, OFF_DIAGONAL) and (x.dtype == torch.float32 or WIDE_PRODUCTS or not x.is_cuda)


class _Rows:
    """The problem, what is known of its rows, and the launches over a chunk of them."""

    def __init__(self, problem: tuple, soft: bool, signed: bool, share: float, needs: int):
        self.x, self.y, self.scale, self.row_bias, _, _, _, self.pairs, self.shift = problem
        self.soft, self.signed, self.share, self.needs = soft, signed, share, needs
        (self.G, self.B, self.D), self.N = self.x.shape, self.y.shape[1]
        new = lambda: torch.empty((self.G, self.B), dtype=torch.float32, device=self.x.device)  # noqa: E731
        self.loss, self.ds_sum, self.inverse = new(), new() if needs else None, new() if needs and not soft else None
        self.norm = self.top = None
        if not soft:
            lengths = [torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32) for t in (self.x, self.y)]
            self.norm, self.top = lengths[0], lengths[1].amax(1)
        # The interpreter would cut off to bfloat16 instead of rounding.
        self.short = torch.float32 if INTERPRETED else self.x.dtype

    def chunk(self, first: int, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dS, or E, of rows first .. first + n [G, n, N], and what its transpose multiplies for dy [G, n, D]."""
        input_precision, constants = precision(self.x.dtype, INTERPRETED), {"OFF_DIAGONAL": self.pairs == OFF_DIAGONAL}
        wide = hopper(self.x.device)
        t = tiling(self.x.dtype, input_precision == "tf32", self.soft, bool(self.needs), wide, INTERPRETED)
        tiles = triton.cdiv(self.N, t.BN)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty((self.G, n, *shape), dtype=dtype, device=self.x.device)

        ds = new(self.N, dtype=self.short) if self.needs else None
        part, ds_part = new(tiles), new(tiles) if self.soft and self.needs & NEED_ROW_BIAS else None
        inputs = (self.x, self.y, self.scale, self.row_bias, self.norm, self.top, ds, part)
        sizes, shift = (self.B, self.N, self.D, first, n), max(self.shift, 0)
        with device_guard(self.x):
            slope_kernel[(self.G * triton.cdiv(n, t.BM) * tiles,)](
                *inputs, ds_part, *sizes, shift, self.share, SOFT=self.soft, SIGNED=self.signed,
                POSITIVE=bool(self.share), PRECISION=input_precision,
                BM=t.BM, BN=t.BN, BK=t.BK, GROUP=GROUP, num_warps=t.num_warps, num_stages=t.num_stages,
                enable_fp_fusion=True, **constants,
            )  # fmt: skip
            rows = slice(first, first + n)
            if self.soft:
                torch.sum(part, 2, out=self.loss[:, rows])
                if ds_part is not None and self.ds_sum is not None:
                    torch.sum(ds_part, 2, out=self.ds_sum[:, rows])
                return ds, self.x[:, rows]
            right = new(self.D, dtype=self.short) if self.needs & NEED_Y else None
            finish_kernel[(self.G * n,)](
                *inputs, self.loss, self.ds_sum, self.inverse, right, *sizes, tiles, shift, self.share,
                POSITIVE=bool(self.share), num_warps=4, enable_fp_fusion=True, **finish_blocks(self.D, INTERPRETED),
                **constants,
            )  # fmt: skip
        return ds, right


def loss(
    problem: tuple, w_row: float, w_soft: float, w_pos: float, soft_signed: bool, needs: int
) -> tuple[torch.Tensor, ...]:
    """(loss [G], dx, dy, dscale, drow_bias, dcol_bias) as the operator dot_critic_loss has it; see `eligible`."""
    x, y, scale, row_bias, *rest, shift = problem
    width = x.shape[2]
    if missing := -width % 16:
        x, y = (F.pad(t, (0, missing)) for t in (x, y))
        problem = (x, y, scale, row_bias, *rest, shift)
    (G, B, D), N = x.shape, y.shape[1]
    weight = w_row or w_soft
    share = w_pos / weight if shift >= 0 else 0.0
    rows = _Rows(problem, bool(w_soft), soft_signed and shift >= 0, float(share), needs)
    dx = torch.empty_like(x, dtype=torch.float32) if needs & (NEED_X | NEED_SCALE) else None
    dy = torch.zeros((G, N, D), dtype=torch.float32, device=x.device) if needs & NEED_Y else None
    step = min(B, rows_of_chunk(G, N, x.element_size()))
    for first in range(0, B, step):
        n = min(step, B - first)
        ds, right = rows.chunk(first, n)
        if ds is None:
            continue
        ds, part = ds.to(x.dtype), slice(first, first + n)
        if dx is not None:
            if rows.inverse is None:
                dx[:, part] = product(ds, y)
            else:
                torch.mul(product(ds, y), rows.inverse[:, part, None], out=dx[:, part])
        if dy is not None and right is not None:
            add_product(dy, ds.mT, right.to(x.dtype))
    empty, factor = scale.new_empty(0), (scale * weight)[:, None, None]
    # sum_ij dS_ij <x_i, y_j> = sum_i <x_i, (dS y)_i>
    dscale = (dx * x).sum((1, 2)) * weight if dx is not None and needs & NEED_SCALE else empty
    return (
        rows.loss.sum(1, dtype=torch.float64).mul_(weight).to(scale.dtype),
        dx.mul_(factor)[..., :width].contiguous() if dx is not None and needs & NEED_X else empty,
        empty if dy is None else dy.mul_(factor)[..., :width].contiguous(),
        dscale,
        rows.ds_sum * weight if needs & NEED_ROW_BIAS and row_bias is not None and rows.ds_sum is not None else empty,
        scale.new_zeros((G, N)) if needs & NEED_COL_BIAS else empty,
    )
