"""The definition of attention in plain torch, with materialised scores and ordinary autograd; and the same in blocks of
queries.

2 B heads Tq Tk (E + Ev) FLOP forward; twice that plus a recomputation of the scores backward. Memory: several B heads
Tq Tk arrays, or blocks of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.precision import outside_autocast
from .problem import Pair
from .schema import dropout_threshold

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, kept in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def dropout_hash(seed: Tensor, batch: int, heads: int, rows: Tensor, keys: int) -> Tensor:
    """The 32-bit hash of schema.py for every weight, [B, heads, len(rows), keys] int64."""
    device = rows.device
    k = _mix(_mix(seed.reshape(()) & _WORD) ^ ((seed.reshape(()) >> 32) & _WORD))
    k = _mix((k + torch.arange(batch * heads, device=device)) & _WORD).view(batch, heads, 1)
    r1 = _mix((k + rows) & _WORD)
    r2 = _mix(k ^ r1)
    x = (r1.unsqueeze(-1) + 0x9E3779B9 * torch.arange(keys, device=device)) & _WORD
    x = x ^ (x >> 16)
    x = ((x * 0x7FEB352D) & _WORD) ^ r2.unsqueeze(-1)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def dropout_factor(
    seed: Tensor, p: float, batch: int, heads: int, rows: Tensor, keys: int, dtype: torch.dtype
) -> Tensor:
    """m_ij of schema.py, [B, heads, len(rows), keys]."""
    return (dropout_hash(seed, batch, heads, rows, keys) >= dropout_threshold(p)).to(dtype) / (1.0 - p)


def _within(lengths: Tensor, positions: Tensor) -> Tensor | None:
    """A mask of the positions that are not padding, [B, 1, T, 1]; None if there is no padding."""
    return None if lengths.shape[0] == 0 else (positions < lengths.view(-1, 1)).view(lengths.shape[0], 1, -1, 1)


def _zero_padding(t: Tensor, within: Tensor | None) -> Tensor:
    return t if within is None else t.where(within, torch.zeros((), dtype=t.dtype, device=t.device))


def _allowed(rows: Tensor, keys: int, query_within: Tensor | None, key_within: Tensor | None, offset: int) -> Tensor:
    """A mask of the weights that may be nonzero; broadcasts to [B, heads, rows, keys]."""
    columns = torch.arange(keys, device=rows.device)
    allowed = (columns - rows.view(-1, 1) <= offset).view(1, 1, -1, keys)
    if key_within is not None:
        allowed = allowed & key_within.mT
    return allowed if query_within is None else allowed & query_within


def threshold(s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Sparsemax over allowed scores by sorting (Martins and Astudillo 2016, algorithm 1). Returns the highest score
    [..., 1] and tau minus that score [..., 1], which stays precise for large scores."""
    with torch.no_grad():
        z = s.masked_fill(~allowed, -torch.inf).sort(-1, descending=True).values
        top = z[..., :1]
        top = torch.where(top == -torch.inf, 0.0, top)
        total = (z - top).where(z > -torch.inf, 0.0).cumsum(-1)
        k = torch.arange(1, z.shape[-1] + 1, device=s.device, dtype=s.dtype)
        size = (1 + k * (z - top) > total).sum(-1, keepdim=True).clamp(min=1)
        coarse = (total.gather(-1, size - 1) - 1) / size
        support = allowed & (s - top > coarse)
    tau = (((s - top).where(support, 0.0)).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True).clamp(min=1)
    return top, tau


def normalize(s: Tensor, allowed: Tensor, sparse: bool) -> tuple[Tensor, Tensor]:
    """Weights p and the statistic [..., 1] of schema.py of scores [B, heads, Tq, Tk]."""
    allowed = allowed.expand(s.shape)
    alive = allowed.any(-1, keepdim=True)
    if sparse:
        top, tau = threshold(s, allowed)
        p = (s - top - tau).clamp(min=0).where(allowed, 0.0)
        stat = top + tau
        # If tau was rounded up to the maximum, the support would be empty; the next smaller number is used instead.
        below = top.detach().nextafter(torch.full_like(top, -torch.inf))  # has no forward mode in torch 2.6
        stat = torch.where(stat >= top, below, stat)
    else:
        stat = s.masked_fill(~allowed, -torch.inf).where(alive, 0.0).logsumexp(-1, keepdim=True)
        p = (s.where(allowed, 0.0) - stat).exp().where(allowed, 0.0)
    return p, stat.where(alive, torch.inf)


@outside_autocast  # autocast would multiply the widened inputs in 16 bits
def _weights_and_stat(pair: Pair, first: int = 0) -> tuple[Tensor, Tensor]:
    """Weights after dropout [B, heads, Tq, Tk] and the statistic [B, heads, Tq, 1]."""
    query, key, dropout_p = pair.query, pair.key, pair.dropout_p
    dtype, (batch, heads, length, _), keys = accumulate_dtype(query.dtype), query.shape, key.shape[2]
    rows = torch.arange(first, first + length, device=query.device)
    query_within = _within(pair.query_lengths, rows)
    key_within = _within(pair.key_lengths, torch.arange(keys, device=key.device))
    q = _zero_padding(query, query_within).to(dtype)
    k = _zero_padding(key, key_within).to(dtype)
    allowed = _allowed(rows, keys, query_within, key_within, pair.causal_offset)
    p, stat = normalize((q * pair.scale) @ k.mT, allowed, pair.sparse)
    if dropout_p > 0:
        p = p * dropout_factor(pair.seed, dropout_p, batch, heads, rows, keys, dtype)
    return p, stat


def weights(pair: Pair) -> Tensor:
    """Normalised weights after dropout, [B, heads, Tq, Tk] in the accumulation type."""
    return _weights_and_stat(pair)[0]


@outside_autocast
def attention(pair: Pair, first: int = 0) -> tuple[Tensor, Tensor]:
    """out and stat of schema.py for one pair, differentiable any number of times. `query` may be a block of a longer
    sequence that starts at row `first`."""
    p, stat = _weights_and_stat(pair, first)
    key_within = _within(pair.key_lengths, torch.arange(pair.key.shape[2], device=pair.key.device))
    v = _zero_padding(pair.value, key_within).to(p.dtype)
    return (p @ v).to(pair.query.dtype), stat.squeeze(-1)


def _blocks(pair: Pair, block_bytes: int | None) -> range:
    """First rows of the blocks. An array of a block's scores takes `block_bytes`; with None there is one block."""
    (batch, heads, length, _), keys = pair.query.shape, pair.key.shape[2]
    if block_bytes is None:
        return range(0, length, length)
    return range(0, length, min(length, max(1, block_bytes // (8 * batch * heads * keys))))


def forward(pair: Pair, block_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """`attention` without autograd, in blocks of rows."""
    blocks = _blocks(pair, block_bytes)
    parts = [attention(pair._replace(query=pair.query[:, :, i : i + blocks.step]), i) for i in blocks]
    return torch.cat([out for out, _ in parts], 2), torch.cat([stat for _, stat in parts], 2)


def backward(
    grad_out: Tensor, pair: Pair, stat: Tensor, block_bytes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one pair by the formulas of schema.py; weights are recomputed from `stat` in blocks."""
    query, key, value, query_lengths, key_lengths, causal_offset, scale, dropout_p, seed, sparse = pair
    dtype, (batch, heads, length, _), keys = accumulate_dtype(query.dtype), query.shape, key.shape[2]
    key_within = _within(key_lengths, torch.arange(keys, device=key.device))
    k, v = _zero_padding(key, key_within).to(dtype), _zero_padding(value, key_within).to(dtype)
    dq, dk, dv = torch.empty_like(query, dtype=dtype), torch.zeros_like(k), torch.zeros_like(v)
    blocks = _blocks(pair, block_bytes)
    for first in blocks:
        block = slice(first, min(first + blocks.step, length))
        rows = torch.arange(block.start, block.stop, device=query.device)
        query_within = _within(query_lengths, rows)
        q = _zero_padding(query[:, :, block], query_within).to(dtype)
        g = _zero_padding(grad_out[:, :, block], query_within).to(dtype)
        allowed = _allowed(rows, keys, query_within, key_within, causal_offset)
        shifted = (q * scale) @ k.mT - stat[:, :, block].unsqueeze(-1)
        p = (shifted.clamp(0, 1) if sparse else shifted.where(allowed, 0.0).exp()).where(allowed, 0.0)
        dp, kept = g @ v.mT, p
        if dropout_p > 0:
            factor = dropout_factor(seed, dropout_p, batch, heads, rows, keys, dtype)
            dp, kept = dp * factor, p * factor
        if sparse:
            support = (p > 0).to(dtype)
            ds = support * (dp - (support * dp).sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp(min=1))
        else:
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        ds = ds * scale
        dq[:, :, block] = ds @ k
        dk += ds.mT @ q
        dv += kept.mT @ g
    return tuple(d.to(query.dtype).contiguous() for d in (dq, dk, dv))  # type: ignore[return-value]
