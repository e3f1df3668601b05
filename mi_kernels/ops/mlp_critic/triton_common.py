"""Tile primitives, tiles of pairs and launch settings that the MLP critic's Triton kernels share.

A tile of pairs is BI rows of x against BJ columns of y, flattened to P = BI BJ with columns fastest: the long side of a
matmul tile. `u_i + v_j` of a tile is built in registers from BI + BJ vectors. A launch sees a chunk: whole groups, or a
rectangle of rows and columns of one group, so u and v of a chunk are contiguous; `shift` is its first row less its
first column, and pair (i, j) of the chunk is on the diagonal where i + shift == j. `pitch` is the distance between two
rows of stored scores, and between two words of 32 units of stored ReLU bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.triton import load_tile, next_power, precision, sigmoid
from .schema import PIECEWISE_LINEAR

# Pairs of one group in a chunk are counted in 32 bits, with room for the last tile.
_MAX_PAIRS = 2**30
_MAX_SIDE = 2**30
_PROGRAMS = 512  # programs a launch aims at: several times the multiprocessors of any GPU


@triton.jit
def activate(b_z, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(b_z < 0.0, 0.0, b_z)  # unlike tl.maximum, propagates NaN
    elif ACT == "leaky_relu":
        return tl.where(b_z < 0.0, 0.01 * b_z, b_z)
    elif ACT == "tanh":
        t = tl.exp(-2.0 * tl.abs(b_z))
        t = (1.0 - t) / (1.0 + t)
        return tl.where(b_z < 0.0, -t, t)
    elif ACT == "sigmoid":
        return sigmoid(b_z)
    elif ACT == "elu":
        return tl.where(b_z > 0.0, b_z, tl.exp(tl.minimum(b_z, 0.0)) - 1.0)
    elif ACT == "gelu":
        return 0.5 * b_z * (1.0 + tl.erf(b_z * 0.7071067811865476))
    else:
        return b_z * sigmoid(b_z)


@triton.jit
def slope(b_z, ACT: tl.constexpr):
    """The derivative of the activation."""
    if ACT == "relu":
        return tl.where(b_z > 0.0, 1.0, 0.0).to(b_z.dtype)
    elif ACT == "leaky_relu":
        return tl.where(b_z > 0.0, 1.0, tl.full(b_z.shape, 0.01, b_z.dtype))  # 0.01 in the dtype of z
    elif ACT == "tanh":
        t = tl.exp(-2.0 * tl.abs(b_z))
        return 4.0 * t / ((1.0 + t) * (1.0 + t))
    elif ACT == "sigmoid":
        s = sigmoid(b_z)
        return s * (1.0 - s)
    elif ACT == "elu":
        return tl.where(b_z > 0.0, 1.0, tl.exp(tl.minimum(b_z, 0.0)))
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
        return 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476)) + b_z * density
    else:
        s = sigmoid(b_z)
        return s * (1.0 + b_z * (1.0 - s))


@triton.jit
def hidden_tile(p_u, p_v, o_i, o_j, o_l, n_rows, n_cols, H1, ACC: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
                BL: tl.constexpr):  # fmt: skip
    """The first layer of a tile of pairs before its activation: [BI BJ, BL]."""
    b_u = load_tile(p_u, o_i, o_l, n_rows, H1).to(ACC)  # [BI, BL]
    b_v = load_tile(p_v, o_j, o_l, n_cols, H1).to(ACC)  # [BJ, BL]
    return tl.reshape(b_u[:, None, :] + b_v[None, :, :], [BI * BJ, BL])


@triton.jit
def bit_values(b_words, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """The slopes that the lowest bits of words stand for: the words' shape."""
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    b_bits = (b_words & 1).to(ACC)  # the interpreter has no integer to bfloat16
    return (b_bits if ACT == "relu" else 0.01 + 0.99 * b_bits).to(DTYPE)


@triton.jit
def load_bits(p_bits, o_i, o_j, m, i_k, n_words, pitch, ACT: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr,
              BK: tl.constexpr):  # fmt: skip
    """Slopes of units i_k .. i_k + BK of pairs (o_i, o_j) [P]: [P, BK]."""
    o_word = i_k // 32 + tl.arange(0, BK // 32)
    p = p_bits + (o_i.to(tl.int64)[:, None] * n_words + o_word[None, :]) * pitch + o_j[:, None]
    b_words = tl.load(p, mask=m[:, None] & (o_word < n_words)[None, :], other=0)  # [P, BK / 32]
    b_bits = b_words[:, :, None] >> tl.arange(0, 32)[None, None, :]
    return bit_values(tl.reshape(b_bits, [P, BK]), ACT, DTYPE)


@triton.jit
def load_bits_transposed(p_bits, o_i, o_j, m, i_k, n_words, pitch, ACT: tl.constexpr, DTYPE: tl.constexpr,
                         P: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """What `load_bits` loads, [BK, P], without a transposition."""
    o_word = i_k // 32 + tl.arange(0, BK // 32)
    p = p_bits + (o_i.to(tl.int64)[None, :] * n_words + o_word[:, None]) * pitch + o_j[None, :]
    b_words = tl.load(p, mask=m[None, :] & (o_word < n_words)[:, None], other=0)  # [BK / 32, P]
    b_bits = b_words[:, None, :] >> tl.arange(0, 32)[None, :, None]
    return bit_values(tl.reshape(b_bits, [BK, P]), ACT, DTYPE)


@triton.jit
def operand(b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """b as one side of a product of tiles of DTYPE; as it is in the interpreter, which would cut it off to bfloat16."""
    if PRECISION == "upcast":
        return b
    else:
        return b.to(DTYPE)


class Tiling(NamedTuple):
    """A tile of BI x BJ pairs; BN owned units of a layer, BK units a step of an inner loop."""

    BI: int
    BJ: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Critic:
    """A critic on a chunk. `w2` and `b2` are None with one hidden layer; all parameters have one group or all."""

    u: Tensor
    v: Tensor
    w2: Tensor | None
    b2: Tensor | None
    w: Tensor
    b: Tensor
    activation: str
    output: str
    stored: bool = False  # a chunk stores its layers, for torch's matmuls (triton_matmuls.py)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.u.shape[0], self.u.shape[1], self.v.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """(H1, H2), H2 = 0 with one hidden layer."""
        return self.u.shape[2], 0 if self.w2 is None else self.w2.shape[1]

    @property
    def words(self) -> int:
        return -(-self.widths[1] // 32)

    @property
    def own(self) -> bool:
        """Whether every group has parameters of its own."""
        return self.w.shape[0] > 1

    @property
    def by_bits(self) -> bool:
        """Whether a bit tells the slope of a unit of the second hidden layer."""
        return self.w2 is not None and self.activation in PIECEWISE_LINEAR and not self.stored

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' products; u and v may be wider."""
        return self.w.dtype

    @property
    def accumulator(self) -> torch.dtype:
        return accumulate_dtype(self.dtype)

    def chunk(self, g: slice, r: slice, c: slice) -> Critic:
        own = {n: t[g] for n in ("w2", "b2", "w", "b") if (t := getattr(self, n)) is not None and self.own}
        return replace(self, u=self.u[g, r], v=self.v[g, c], **own)


def critic(
    u: Tensor, v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, output: str
) -> Critic:
    """A critic whose tensors the kernels can read. Raises RuntimeError for tensors that no kernel here can read and
    ValueError for sizes beyond 2^30."""
    if not (INTERPRETED or u.is_cuda):
        raise RuntimeError(f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got x on {u.device}")
    if len(weights) not in (1, 2):
        raise RuntimeError(f"backend 'triton' scores critics of one or two hidden layers, got {len(weights)}")
    sides = (*u.shape[1:], v.shape[1], weights[0].shape[1])
    if max(sides) > _MAX_SIDE:
        raise ValueError(f"B, N and hidden widths must not exceed {_MAX_SIDE}, got {sides}")
    groups = max(t.shape[0] for t in (*weights, *biases))
    parameters = [t.expand(groups, *t.shape[1:]).contiguous() for t in (*weights, *biases)]
    n = len(weights)
    w2, b2 = (parameters[0], parameters[n]) if n == 2 else (None, None)
    return Critic(u.contiguous(), v.contiguous(), w2, b2, parameters[n - 1], parameters[-1], activation, output)


def chunks(
    sizes: tuple[int, int, int], pair_bytes: int, budget: int, rows: int, columns: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Groups, rows and columns of chunks of at most `budget` bytes (or one tile of rows x columns pairs)."""
    G, B, N = sizes
    pairs = min(max(1, budget // pair_bytes), _MAX_PAIRS)
    if B * N <= pairs:
        step = pairs // (B * N)
        for g in range(0, G, step):
            yield slice(g, min(g + step, G)), slice(0, B), slice(0, N)
        return
    n_cols = N if rows * N <= pairs else min(N, max(columns, pairs // rows // columns * columns))
    n_rows = min(B, max(rows, pairs // n_cols // rows * rows))
    for g in range(G):
        for r in range(0, B, n_rows):
            for c in range(0, N, n_cols):
                yield slice(g, g + 1), slice(r, min(r + n_rows, B)), slice(c, min(c + n_cols, N))


def splits(programs: int, most: int) -> int:
    """Into how many parts a sum is split where one part takes `programs`; by shape alone, so a result does not depend
    on the device."""
    return max(1, min(most, _PROGRAMS // programs))


def mode(dtype: torch.dtype) -> str:
    """PRECISION of a launch."""
    return precision(dtype, INTERPRETED)


def block(n: int, low: int, high: int) -> int:
    """A power of two that covers n, within [low, high]."""
    return min(high, next_power(n, low))


INTERPRETED = not isinstance(activate, triton.runtime.JITFunction)
