"""Argument checks and public functions of attention between sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common.checks import (
    backend_name,
    check_bool,
    check_choice,
    check_floats,
    check_integer,
    check_lengths,
    check_range,
    check_tensor,
)
from ..common.precision import autocast_on
from . import autograd, dispatch
from .problem import Pairs, Rule
from .schema import NO_OFFSET, NORMALIZERS


def _backend(device: torch.device, requested: str | None) -> str:
    return dispatch.backend_for(device, requested)


# What torch.compiler.assume_constant_result sets; the decorator itself would import the compiler, and so triton.
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]

_SHAPES = {
    "query": "[batch, heads, Tq, head size]",
    "key": "[batch, heads, Tk, head size]",
    "value": "[batch, heads, Tk, value size]",
}


def _check_sequences(name: str, shape: str, t: Tensor) -> None:
    check_floats(name, t)
    if t.dim() != 4 or 0 in t.shape:
        raise ValueError(f"{name} must have shape {shape} and not be empty, got {tuple(t.shape)}")


def _check_pair(names: dict[str, str], query: Tensor, key: Tensor, value: Tensor) -> None:
    for side, t in (("query", query), ("key", key), ("value", value)):
        _check_sequences(names[side], _SHAPES[side], t)
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{names['key']} must have the batch, heads and head size of {names['query']} {tuple(query.shape)}, "
            f"got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{names['value']} must have the batch, heads and length of {names['key']} {tuple(key.shape)}, "
            f"got {tuple(value.shape)}"
        )


def _check_devices(first: str, like: Tensor, named: Sequence[tuple[str, Tensor]]) -> None:
    for name, t in named:
        if t.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}, got {t.device}")


def _check_dtypes(first: str, like: Tensor, named: Sequence[tuple[str, Tensor]]) -> None:
    for name, t in named:
        if t.dtype != like.dtype:
            raise ValueError(f"{name} must have the dtype of {first}, {like.dtype}, got {t.dtype}")


def _check_lengths(name: str, lengths: Tensor | None, side: str, t: Tensor) -> Tensor:
    """Checks lengths and returns them as [B] int64 on the device of t, or as [0] for None."""
    if lengths is None:
        return torch.empty(0, dtype=torch.int64, device=t.device)
    check_lengths(name, lengths, t.shape[:1], f"[items of {side}]", t.shape[2], f"the length of {side}")
    return lengths.to(device=t.device, dtype=torch.int64)


def _check_offset(name: str, offset: int | None) -> int:
    if offset is None:
        return NO_OFFSET
    check_integer(name, offset, least=-(2**63), most=math.inf)
    return max(-NO_OFFSET, min(offset, NO_OFFSET))


def _check_scale(name: str, scale: float | None, query: Tensor) -> float:
    if scale is None:
        return 1.0 / math.sqrt(query.shape[3])
    check_range(name, scale, -1e30, 1e30)
    return float(scale)


def _check_dropout(name: str, p: float) -> float:
    check_range(name, p, 0.0, 1.0)
    return float(p)


def _seeds(seed: int | Tensor | None, pairs: int, dropouts: Sequence[float], device: torch.device) -> Tensor:
    """One int64 seed per pair: seed, seed + 1, ... If dropout needs a seed and none is given, torch's generator draws
    it."""
    if seed is None:
        if any(dropouts):
            return torch.randint(2**62, (pairs,), dtype=torch.int64, device=device)
        return torch.zeros(pairs, dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        check_tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be an integer or one int64 in a tensor, got {seed.dtype} {tuple(seed.shape)}")
        return seed.reshape(1).to(device) + torch.arange(pairs, device=device)
    check_integer("seed", seed, least=-(2**63), most=math.inf)
    if seed >= 2**63 - pairs:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
    return torch.arange(pairs, device=device) + seed


def _prepare(
    labels: Sequence[dict[str, str]],
    inputs: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    rules: Mapping[str, Sequence[Any]],
    normalizer: str,
    seed: int | Tensor | None,
) -> tuple[Rule, Pairs]:
    """Checks the arguments, applies autocast and collects the tensors of every pair."""
    check_choice("normalizer", normalizer, NORMALIZERS)
    query_lengths, key_lengths, offsets, scales, dropouts = [], [], [], [], []
    named: list[tuple[str, Tensor]] = []
    for i, (name, query, key, value) in enumerate(zip(labels, *inputs, strict=True)):
        _check_pair(name, query, key, value)
        named += [(name["query"], query), (name["key"], key), (name["value"], value)]
        query_lengths.append(_check_lengths(name["query_lengths"], rules["query_lengths"][i], name["query"], query))
        key_lengths.append(_check_lengths(name["key_lengths"], rules["key_lengths"][i], name["key"], key))
        offsets.append(_check_offset(name["causal_offset"], rules["causal_offset"][i]))
        scales.append(_check_scale(name["scale"], rules["scale"][i], query))
        dropouts.append(_check_dropout(name["dropout_p"], rules["dropout_p"][i]))
    first, like = named[0]
    _check_devices(first, like, named[1:])
    device = like.device.type
    if autocast_on(device) and like.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        inputs = tuple([t.to(dtype) for t in side] for side in inputs)  # type: ignore[assignment]
        named = [(name, t.to(dtype)) for name, t in named]
        like = named[0][1]
    _check_dtypes(first, like, named[1:])
    rule = Rule(tuple(offsets), tuple(scales), tuple(dropouts), normalizer == "sparsemax")
    seeds = _seeds(seed, len(labels), dropouts, like.device)
    tensors: list[Any] = [*(list(side) for side in inputs), query_lengths, key_lengths, seeds]
    return rule, Pairs(*tensors)


_RULES = ("query_lengths", "key_lengths", "causal_offset", "scale", "dropout_p")


@overload
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_lengths: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    causal_offset: int | None = ...,
    normalizer: str = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    seed: int | Tensor | None = ...,
    return_weights: Literal[False] = ...,
    average_weights: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_lengths: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    causal_offset: int | None = ...,
    normalizer: str = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    seed: int | Tensor | None = ...,
    return_weights: Literal[True],
    average_weights: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_offset: int | None = None,
    normalizer: str = "softmax",
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    return_weights: bool = False,
    average_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries to the keys of another sequence, normalizer(scale q k^T) v, without storing the weights.

    query, key, value: [B, heads, Tq, E], [B, heads, Tk, E] and [B, heads, Tk, Ev], with any strides. Self-attention is
        the case key = query. Returns [B, heads, Tq, Ev] in their dtype.
    query_lengths, key_lengths: integers [B]. Keys beyond the key length of an item are ignored, whatever they contain.
        Query rows beyond the query length give zeros and no gradient.
    causal_offset: c masks keys with j - i > c. 0 is the usual causal mask; MulT's default is |Tk - Tq|. A query without
        any key gives zeros.
    normalizer: "softmax", or "sparsemax", the Euclidean projection onto the simplex (Martins and Astudillo 2016,
        equation 2), which MIRD's word-shift attention uses.
    dropout_p: probability of dropping a normalised weight, in [0, 1); the others are multiplied by 1 / (1 - p).
    scale: factor of the scores; 1 / sqrt(E) by default.
    seed: an integer or an int64 tensor with one element that determines the dropout mask, the same on every backend. By
        default drawn from torch's generator of the device.
    return_weights: also return the weights after dropout, [B, heads, Tq, Tk] in the dtype of query, differentiable.
        They are computed in plain torch with several times O(B heads Tq Tk) memory.
    average_weights: return their mean over the heads, [B, Tq, Tk], as `torch.nn.MultiheadAttention` does.

    Differentiable any number of times, also in forward mode and under torch.func transforms. Values and first gradients
    use the kernels (vmap becomes a batch dimension); other derivatives materialise the weights. Under autocast the
    inputs are cast to its dtype. Scores and sums are fp32 (fp64 for fp64 inputs).

    Cost: 2 B heads Tq Tk (E + Ev) FLOP and B heads Tq Tk exponentials forward; about 2.5 times the FLOP and as many
    exponentials backward. Pairs that lengths and the mask exclude cost nothing. Besides inputs and output, 4 B heads Tq
    bytes are kept for backward. Source: Vaswani et al. 2017, equation 1, with the masks of MulT (Tsai et al. 2019,
    section 3).

    Raises ValueError for empty or mismatched shapes, mixed devices or dtypes, lengths out of range (on a GPU, in a
    compiled graph and under vmap they are clamped instead), unknown names and numbers out of range; TypeError for wrong
    types; RuntimeError for a named backend that cannot run.
    """
    check_bool(return_weights=return_weights, average_weights=average_weights)
    labels = {name: name for name in ("query", "key", "value", *_RULES)}
    rules = (query_lengths, key_lengths, causal_offset, scale, dropout_p)
    single = {name: [x] for name, x in zip(_RULES, rules, strict=True)}
    rule, pairs = _prepare([labels], ([query], [key], [value]), single, normalizer, seed)
    out = autograd.attention(rule, _backend(query.device, backend_name(backend) or None), pairs)[0]
    if not return_weights:
        return out
    weights = autograd.weights(rule, pairs)[0]
    return out, (weights.mean(1) if average_weights else weights).to(out.dtype)


def _sequence(name: str, given: Any, pairs: int) -> Sequence[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a list, one entry per pair, got {type(given).__name__}")
    if len(given) != pairs:
        raise ValueError(f"{name} must have one entry per pair, {pairs}, got {len(given)}")
    return given


def cross_attention_grouped(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    query_lengths: Sequence[Tensor | None] | None = None,
    key_lengths: Sequence[Tensor | None] | None = None,
    causal_offset: Sequence[int | None] | int | None = None,
    normalizer: str = "softmax",
    dropout_p: Sequence[float] | float = 0.0,
    scale: Sequence[float | None] | float | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Several independent calls of `cross_attention` at once: takes lists of its arguments, returns a list of its
    results.

    The pairs may differ in all sizes, but share one dtype and device. `query_lengths` and `key_lengths` are lists whose
    entries may be None; `causal_offset`, `dropout_p` and `scale` are lists or one value for all pairs. Pair n uses the
    dropout seed seed + n. Every (pair, item, head) is a work item of the same launch, so short pairs fill the idle time
    of long ones.

    Cost, errors and sources are those of `cross_attention`; errors name the entry, such as `keys[2]`.
    """
    if not isinstance(queries, (list, tuple)):
        raise TypeError(f"queries must be a list of tensors, got {type(queries).__name__}")
    if not queries:
        raise ValueError("queries must be a list of at least one tensor, got none")
    pairs = len(queries)
    inputs = (queries, _sequence("keys", keys, pairs), _sequence("values", values, pairs))
    rules: dict[str, Sequence[Any]] = {}
    for name, given in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        rules[name] = [None] * pairs if given is None else _sequence(name, given, pairs)
    for name, number in (("causal_offset", causal_offset), ("scale", scale), ("dropout_p", dropout_p)):
        rules[name] = _sequence(name, number, pairs) if isinstance(number, (list, tuple)) else [number] * pairs
    plural = {"query": "queries", "key": "keys", "value": "values"} | {name: name for name in _RULES}
    labels = [{name: f"{shown}[{i}]" for name, shown in plural.items()} for i in range(pairs)]
    rule, tensors = _prepare(labels, inputs, rules, normalizer, seed)
    return list(autograd.attention(rule, _backend(tensors.seed.device, backend_name(backend) or None), tensors))
