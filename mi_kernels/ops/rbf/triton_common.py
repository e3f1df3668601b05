"""Tile primitives and launch settings that the Gaussian kernel sums in Triton share.

A program owns BM rows of the samples and walks over a range of columns, BN a step; all samples are fp32 or fp64, about
their mean and in units of the smallest bandwidth. A tile of inner products becomes a tile of squared distances, and
that e = expm1(-gamma r^2); none of them leaves the program, except where features are wider than BO: there slopes go to
a buffer of CHUNK_BYTES, which a matmul reads.

Every kernel is launched twice. The first launch leaves out tiles that hold pairs too near for inner products
(distances.py) and marks them; the second, DIRECT, computes these from differences of the rows as they were given.
Nothing is read on the host, and where no tile is marked the second launch reads the marks and ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.triton import load_vector, next_power
from .distances import FARTHEST, LARGEST_NORMS, NEAR, SAFE_NORMS

CHUNK_BYTES = 64 * 2**20
_PROGRAMS = 512  # programs a launch aims at; a constant, so that sums have one order on every GPU
_MAX_SIDE = 2**30
_FARTHEST = tl.constexpr(FARTHEST)
_LARGEST_NORMS = tl.constexpr(LARGEST_NORMS)
_NEAR = tl.constexpr(NEAR)
_SAFE_NORMS = tl.constexpr(SAFE_NORMS)


@triton.jit
def expm1(t, TERMS: tl.constexpr):
    """exp(t) - 1 for t <= 0 with a small relative error; a NaN stays one."""
    b_poly = tl.zeros_like(t) + 1.0
    for k in tl.static_range(TERMS, 1, -1):
        b_poly = 1.0 + b_poly * (t * (1.0 / k))
    return tl.where(t > -1.0, t * b_poly, tl.exp(t) - 1.0)


@triton.jit
def kernel(t, b_e):
    """exp(t) for t <= 0 from e = expm1(t). In fp32 e + 1 would leave no digits of a small one. In fp64 it leaves
    enough, and a second exponential would need registers that are not there."""
    if t.dtype.is_fp64():
        b_k = b_e + 1.0
    else:
        b_k = tl.where(t > -1.0, b_e + 1.0, tl.exp(t))
    return b_k


@triton.jit
def distance_tile(b_dot, b_own_norm, b_oth_norm, o_own, o_oth, EPS: tl.constexpr):
    """Squared distances, exactly 0 where within rounding of it and on the diagonal: [BM, BN]."""
    b_norms = b_own_norm[:, None] + b_oth_norm[None, :]
    b_d = b_norms - 2.0 * b_dot
    b_d = tl.where(b_d <= EPS * b_norms, 0.0, b_d)  # NaN propagates
    return tl.where(o_own[:, None] == o_oth[None, :], 0.0, b_d)


@triton.jit
def without_own(b_slope, o_own, o_oth):
    """Slopes with 0 where a row meets itself: s_i z_i - W_ii z_i would leave the rounding of a far row."""
    return tl.where(o_own[:, None] == o_oth[None, :], 0.0, b_slope)


@triton.jit
def any_near(b_dot, b_own_norm, b_oth_norm, o_own, o_oth):
    """1 if a pair of the tile is too near for inner products, else 0."""
    b_own = tl.where(b_own_norm <= _LARGEST_NORMS, b_own_norm, float("nan"))
    b_oth = tl.where(b_oth_norm <= _LARGEST_NORMS, b_oth_norm, float("nan"))
    b_norms = b_own[:, None] + b_oth[None, :]
    m_far = (b_norms <= _SAFE_NORMS) | (b_norms - 2.0 * b_dot >= _NEAR * b_norms) | (o_own[:, None] == o_oth[None, :])
    return 1 - tl.min(tl.min(m_far.to(tl.int32), 1), 0)


@triton.jit
def difference_tile(p, scale, o_own, o_oth, n_own, n, D, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """|scale (own - oth)|^2 from rows as they were given: [BM, BN]."""
    b_r = tl.zeros([BM, BN], dtype=ACC)
    for d in range(0, D):
        b_own = load_vector(p + d, o_own.to(tl.int64) * D, n_own.to(tl.int64) * D, 0.0)  # [BM]
        b_oth = load_vector(p + d, o_oth.to(tl.int64) * D, n.to(tl.int64) * D, 0.0)  # [BN]
        b_step = (b_own[:, None] - b_oth[None, :]) * scale
        b_r += b_step * b_step
    return tl.where(b_r > _FARTHEST, _FARTHEST, b_r)  # NaN propagates


@triton.jit
def add_along_differences(b_slope, p, p_out, scale, o_own, o_oth, n_own, n, D):
    """Adds sum_j slope_ij scale (own_i - oth_j) to the rows of p_out [n, D]; a slope of 0 adds 0 at any distance."""
    for d in range(0, D):
        o_row = o_own.to(tl.int64) * D
        b_own = load_vector(p + d, o_row, n_own.to(tl.int64) * D, 0.0)  # [BM]
        b_oth = load_vector(p + d, o_oth.to(tl.int64) * D, n.to(tl.int64) * D, 0.0)  # [BN]
        b_step = tl.where(b_slope == 0.0, 0.0, b_slope * ((b_own[:, None] - b_oth[None, :]) * scale))
        m = o_own < n_own
        tl.store(p_out + d + o_row, tl.load(p_out + d + o_row, mask=m, other=0.0) + tl.sum(b_step, 1), mask=m)


@triton.jit
def place(n_own, n_splits, n, BM: tl.constexpr, BN: tl.constexpr):
    """Group, split, first own row and range of columns of a program."""
    n_tiles = tl.cdiv(n_own, BM)
    pid = tl.program_id(0).to(tl.int64)
    i_g = pid // (n_tiles * n_splits)
    i_split = ((pid // n_tiles) % n_splits).to(tl.int32)
    i_own = ((pid % n_tiles) * BM).to(tl.int32)
    width = tl.cdiv(tl.cdiv(n, n_splits), BN) * BN
    return i_g, i_split, i_own, i_split * width, tl.minimum((i_split + 1) * width, n)


class Tiling(NamedTuple):
    """Block sizes of one launch: BM own rows, BN columns and BK features a step, BO features of a gradient."""

    BM: int
    BN: int
    BK: int
    BO: int
    num_warps: int
    num_stages: int


def tiling(dtype: torch.dtype, D: int, interpreted: bool, gradient: bool, sides: int, wide: bool) -> Tiling:
    """Free of register spills on sm_80 and sm_90. Without a gradient nothing but sums is kept. `sides`: of how many
    samples a pair has a distance, one in MMD and two in HSIC. `wide`: from Hopper on, whose products take 64 rows."""
    if interpreted:
        return Tiling(32, 16, 16, 32, 4, 1)
    BO = next_power(min(D, 32 if dtype == torch.float64 else 64), 16)
    if dtype == torch.float64:
        return Tiling(16 if gradient and sides == 2 else 32, 16, 16, BO, 8 if gradient else 4, 1)
    if gradient:
        return Tiling(64 if wide else 64 // sides, 16, 16, BO, 8, 1)
    # Rows that are not aligned take registers for their loads.
    return Tiling(64, 32 if D % 16 else 64 // sides, 16, BO, 8, 1)


def constants(dtype: torch.dtype) -> dict[str, float | int | str]:
    """EPS, TERMS and PRECISION of a launch. fp32 products are three of TF32 parts each: they drop what fp32 sums round
    away too, on tensor cores, whatever torch's switch for TF32 says."""
    if dtype == torch.float64:
        return {"EPS": 4 * torch.finfo(dtype).eps, "TERMS": 18, "PRECISION": "ieee"}
    return {"EPS": 4 * torch.finfo(dtype).eps, "TERMS": 10, "PRECISION": "tf32x3"}


def direct_tiling(t: Tiling) -> Tiling:
    """A DIRECT program: part of a marked tile, so that registers suffice."""
    return t._replace(BM=min(t.BM, 16), num_warps=min(t.num_warps, 4))


def marks(groups: int, rows: int, columns: int, t: Tiling, like: torch.Tensor) -> torch.Tensor:
    """Where a launch marks its tiles: [G, row tiles, column tiles]."""
    shape = (groups, triton.cdiv(rows, t.BM), triton.cdiv(columns, t.BN))
    return torch.empty(shape, dtype=torch.int8, device=like.device)


def about_mean(samples: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Samples [G, n, D] about their mean, times scale [G]."""
    return (samples - samples.mean(1, keepdim=True)).mul_(scale[:, None, None])


def split(groups: int, rows: int, columns: int, t: Tiling) -> int:
    """Into how many ranges the columns are split."""
    want = max(1, _PROGRAMS // (groups * triton.cdiv(rows, t.BM)))
    wanted = min(want, triton.cdiv(columns, 2 * t.BN))
    width = triton.cdiv(triton.cdiv(columns, wanted), t.BN) * t.BN
    return triton.cdiv(columns, width)


def chunks(groups: int, rows: int, columns: int, element: int, BM: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows whose slopes fit CHUNK_BYTES, one row tile at least."""
    step = min(rows, max(1, CHUNK_BYTES // (groups * columns * element * BM)) * BM)
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def check(op: str, interpreted: bool, *samples: torch.Tensor) -> None:
    if not interpreted and not all(t.is_cuda for t in samples):
        raise RuntimeError(f"backend 'triton' runs {op} on CUDA tensors (or with TRITON_INTERPRET=1) alone")
    if max(max(t.shape[1:]) for t in samples) > _MAX_SIDE:
        raise ValueError(f"batch and features must not exceed {_MAX_SIDE}, got {[tuple(t.shape) for t in samples]}")


INTERPRETED = not isinstance(expm1, triton.runtime.JITFunction)
