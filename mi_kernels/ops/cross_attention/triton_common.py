"""Tile primitives, the table of pairs and launch settings that the attention kernels share.

One launch serves all directed pairs of a call. Their pointers and sizes travel as tuples among the kernel's arguments
(no table in memory to copy there first, so that a launch can be captured in a CUDA graph); a program finds the pair
that it belongs to by comparing its id with the pairs' first programs, and selects. Triton would compile a kernel anew
for each pattern of ones and multiples of 16 among integers of a tuple: `encode` makes all of them odd and not 1,
strides come in units of ALIGN elements.

A `side` is a tuple (pointer, distance between rows, number of rows): one head of one item.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import mma
from .schema import MOST_PAIRS, dropout_threshold

# Columns of the table of sizes; a stride takes three.
START, TQ, TK, HEADS, OFFSET, QUERY_LENGTHS, KEY_LENGTHS, DROP_BELOW = (tl.constexpr(i) for i in range(8))
QUERY, KEY, VALUE, GRAD = (tl.constexpr(i) for i in (8, 11, 14, 17))
# Columns of the table of numbers, each a sum of two so that fp64 gets all its digits.
SCALE, KEEP = (tl.constexpr(i) for i in (0, 2))
_MAX_LENGTH = 2**28
MOST_REGISTERS = 255  # of a thread; left to itself, ptxas spills a few to let one more block in


@triton.jit
def decode(n):
    return (n - 3) >> 1


@triton.jit
def pick(t, i_pair, COLUMN: tl.constexpr, N: tl.constexpr):
    """Entry of pair `i_pair` in a column of a tuple of columns of N."""
    x = t[COLUMN * N]
    for n in tl.static_range(1, N):
        x = tl.where(i_pair == n, t[COLUMN * N + n], x)
    return x


@triton.jit
def size(sizes, i_pair, COLUMN: tl.constexpr, N: tl.constexpr):
    return decode(pick(sizes, i_pair, COLUMN, N)).to(tl.int32)


@triton.jit
def drop_bound(sizes, i_pair, N: tl.constexpr):
    """Hashes of a pair below this are dropped."""
    return decode(pick(sizes, i_pair, DROP_BELOW, N)).to(tl.uint32)


@triton.jit
def number(numbers, i_pair, COLUMN: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr):
    return pick(numbers, i_pair, COLUMN, N).to(ACC) + pick(numbers, i_pair, COLUMN + 1, N).to(ACC)


@triton.jit
def pair_of(sizes, pid, N: tl.constexpr):
    """The pair of a program and the program's place among those of its pair."""
    i_pair = 0
    for n in tl.static_range(1, N):
        i_pair += (pid >= decode(sizes[n])).to(tl.int32)
    return i_pair, pid - size(sizes, i_pair, START, N)


@triton.jit
def length(p, flag, i_b, T):
    """Length of item i_b, T where there are no lengths."""
    return tl.minimum(tl.maximum(tl.load(p + i_b, mask=flag != 0, other=T), 0), T).to(tl.int32)


@triton.jit
def side(p, sizes, i_pair, i_b, i_h, n, COLUMN: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr):
    """The rows of head i_h of item i_b, of which n count."""
    per_item = decode(pick(sizes, i_pair, COLUMN, N)).to(tl.int64) * ALIGN
    per_head = decode(pick(sizes, i_pair, COLUMN + 1, N)).to(tl.int64) * ALIGN
    per_row = decode(pick(sizes, i_pair, COLUMN + 2, N)).to(tl.int64) * ALIGN
    return p + i_b * per_item + i_h * per_head, per_row, n


@triton.jit
def load_rows(rows, o_n, o_k, D):
    """Rows `o_n` and features `o_k` of a side, zero outside of it: [BN, BK]."""
    p, per_row, n = rows
    mask = (o_n < n)[:, None] & (o_k < D)[None, :]
    return tl.load(p + o_n.to(tl.int64)[:, None] * per_row + o_k[None, :], mask=mask, other=0.0)


@triton.jit
def products(b_own, b_oth, own, oth, o_own, o_oth, D, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """<own, oth> of one tile [BM, BN], from tiles that hold all features or, where those are None, BK at a time."""
    if b_own is not None:
        return mma(b_own, tl.trans(b_oth), None, ACC, PRECISION)
    else:
        b_dot = tl.zeros([BM, BN], dtype=ACC)
        for i_k in range(0, D, BK):
            o_k = i_k + tl.arange(0, BK)
            b_a = load_rows(own, o_own, o_k, D)  # [BM, BK]
            b_b = load_rows(oth, o_oth, o_k, D)  # [BN, BK]
            b_dot = mma(b_a, tl.trans(b_b), b_dot, ACC, PRECISION)
        return b_dot


@triton.jit
def rounded(b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """b to the nearest of DTYPE; the interpreter cuts off to bfloat16."""
    if PRECISION == "upcast":
        b_bits = b.to(tl.uint32, bitcast=True)
        b = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return b.to(DTYPE)


@triton.jit
def mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def head_key(p_seed, i_pair, i_bh):
    """What the dropout hash of a head starts from."""
    seed = tl.load(p_seed + i_pair)
    return mix(mix(mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)) + i_bh.to(tl.uint32))


@triton.jit
def row_keys(k, o_i):
    b_1 = mix(k + o_i.to(tl.uint32))
    return b_1, mix(k ^ b_1)


@triton.jit
def kept(b_r1, b_r2, o_j, drop_below):
    """Whether a weight survives dropout, for rows and keys that broadcast against each other."""
    x = b_r1 + o_j.to(tl.uint32) * 0x9E3779B9
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) ^ b_r2
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return (x ^ (x >> 16)) >= drop_below


@triton.jit
def weights(b_s, b_stat, m, SPARSE: tl.constexpr):
    """p from scores in units of the normalizer (see `unit`) and their row's statistic."""
    if SPARSE:
        b_over = b_s - b_stat
        # At most 1, beyond which only rounded statistics lead; comparisons keep a NaN.
        return tl.where(m, tl.where(b_over < 0.0, 0.0, tl.where(b_over > 1.0, 1.0, b_over)), 0.0)
    else:
        return tl.where(m, tl.exp2(b_s - b_stat), 0.0)


@triton.jit
def unit(SPARSE: tl.constexpr):
    """Scores of the softmax are kept in bits, for a GPU exponentiates to base 2."""
    return 1.0 if SPARSE else 1.4426950408889634


class Tiling(NamedTuple):
    """Block sizes of one launch: BM queries, BN keys; features in blocks of BE (queries, keys) and BV (values).
    WHOLE says that one block holds them all."""

    BM: int
    BN: int
    BE: int
    BV: int
    num_warps: int
    num_stages: int

    def whole(self, E: int, EV: int) -> bool:
        return self.BE >= E and self.BV >= EV


def encode(n: int) -> int:
    return 2 * n + 3


class Pairs(NamedTuple):
    """Directed pairs with the same head sizes, and where they stand in the call."""

    places: tuple[int, ...]
    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    query_lengths: tuple[Tensor, ...]
    key_lengths: tuple[Tensor, ...]
    causal_offset: tuple[int, ...]
    scale: tuple[float, ...]
    dropout_p: tuple[float, ...]

    @property
    def head_sizes(self) -> tuple[int, int]:
        return self.query[0].shape[3], self.value[0].shape[3]

    @property
    def drops(self) -> bool:
        return any(p > 0 for p in self.dropout_p)

    def starts(self, programs: Iterable[int]) -> tuple[list[int], int]:
        """First program of each pair and the number of programs, from the programs that each pair takes."""
        first, total = [], 0
        for n in programs:
            first.append(total)
            total += n
        return first, total

    def numbers(self) -> tuple[float, ...]:
        """The table of numbers: fp32 and what it leaves of an fp64."""
        columns: list[float] = []
        for values in (self.scale, [1.0 / (1.0 - p) for p in self.dropout_p]):
            high = [struct.unpack("f", struct.pack("f", v))[0] for v in values]
            columns += high + [v - h for v, h in zip(values, high, strict=True)]
        return tuple(columns)

    def sizes(self, starts: Sequence[int], align: int, grad: Sequence[Tensor] = ()) -> tuple[int, ...]:
        """The table of sizes: columns as numbered above, one entry per pair."""
        columns = [
            list(starts),
            [q.shape[2] for q in self.query],
            [k.shape[2] for k in self.key],
            [q.shape[1] for q in self.query],
            # Counted from -Tq, the first offset that allows no key, to Tk, beyond which all are allowed.
            [max(0, min(c + q.shape[2], q.shape[2] + k.shape[2]))
             for c, q, k in zip(self.causal_offset, self.query, self.key, strict=True)],
            [int(n.numel() > 0) for n in self.query_lengths],
            [int(n.numel() > 0) for n in self.key_lengths],
            [dropout_threshold(p) for p in self.dropout_p],
        ]  # fmt: skip
        for tensors in (self.query, self.key, self.value, grad):
            columns += [[t.stride(d) // align for t in tensors] for d in range(3 if tensors else 0)]
        return tuple(encode(n) for column in columns for n in column)


def alignment(tensors: Iterable[Tensor]) -> int:
    """The largest power of two up to 16 that divides all strides between rows."""
    return next(a for a in (16, 8, 4, 2, 1) if all(s % a == 0 for t in tensors for s in t.stride()[:3]))


def with_rows(t: Tensor) -> Tensor:
    """t with features next to each other in memory: any other strides are read as they are."""
    return t if t.stride(3) == 1 else t.contiguous()


def grouped(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    query_lengths: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    causal_offset: Sequence[int],
    scale: Sequence[float],
    dropout_p: Sequence[float],
) -> list[Pairs]:
    """The pairs of a call by head sizes, at most MOST_PAIRS of them in each group: the launches."""
    if not (INTERPRETED or query[0].is_cuda):
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got query on {query[0].device}"
        )
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        if max(q.shape[2], k.shape[2]) > _MAX_LENGTH:
            raise ValueError(f"Tq and Tk must not exceed {_MAX_LENGTH}, got {q.shape[2]} and {k.shape[2]}")
        alike.setdefault((q.shape[3], v.shape[3]), []).append(i)
    parts = [found[i : i + MOST_PAIRS] for found in alike.values() for i in range(0, len(found), MOST_PAIRS)]
    return [
        Pairs(
            places=tuple(part),
            query=tuple(with_rows(query[i]) for i in part),
            key=tuple(with_rows(key[i]) for i in part),
            value=tuple(with_rows(value[i]) for i in part),
            query_lengths=tuple(query_lengths[i] for i in part),
            key_lengths=tuple(key_lengths[i] for i in part),
            causal_offset=tuple(causal_offset[i] for i in part),
            scale=tuple(scale[i] for i in part),
            dropout_p=tuple(dropout_p[i] for i in part),
        )
        for part in parts
    ]


def seeds_of(pairs: Pairs, seed: Tensor) -> Tensor:
    """The seeds of these pairs, without a copy from the host."""
    return seed if len(pairs.places) == seed.shape[0] else torch.cat([seed[i : i + 1] for i in pairs.places])


INTERPRETED = not isinstance(mix, triton.runtime.JITFunction)
