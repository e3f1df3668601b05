"""Runs the attention operators on a backend. Kernels are imported when they are first used."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...backends import requested_backend, resolve, usable
from ..common.precision import outside_autocast
from . import cuda, reference, sdpa
from .schema import library

BLOCK_BYTES = 32 << 20
# backend -> modules with forward(query, ..., sparse) and backward(grad_out, ..., sparse), the operators' own arguments
KERNELS = {"triton": ("triton_forward", "triton_backward"), "cuda": ("cuda", "cuda"), "sdpa": ("sdpa", "sdpa")}
AUTOMATIC = "gpu"  # what runs on a GPU when no backend is named: `_routed` says, call by call


def _kernel(name: str, direction: int) -> ModuleType:
    return importlib.import_module(f"{__package__}.{KERNELS[name][direction]}")


def backend_for(device: torch.device, requested: str | None) -> str:
    """The backend that attends on `device`; raises RuntimeError for a named one that cannot."""
    name = resolve("cross_attention", device, requested)
    return AUTOMATIC if name == "triton" and (requested or requested_backend()) is None else name


def _routed(backend: str, pairs: tuple[Any, ...], sparse: bool) -> str:
    """The kernels of a call: CUDA C++ for heads so narrow that tensor cores would mostly multiply padding, flash
    attention where it computes the same, the grouped Triton kernels otherwise. Forward and backward may differ."""
    if backend != AUTOMATIC:
        return backend
    if cuda.fits(pairs[0], pairs[2]) and usable("cuda"):
        return "cuda"
    return "sdpa" if sdpa.suits(*pairs, sparse=sparse) else "triton"


@outside_autocast
def forward(
    query: Any,
    key: Any,
    value: Any,
    query_lengths: Any,
    key_lengths: Any,
    causal_offset: Any,
    scale: Any,
    dropout_p: Any,
    seed: Any,
    sparse: Any,
    backend: Any,
) -> Any:
    pairs = (query, key, value, query_lengths, key_lengths, causal_offset, scale, dropout_p)
    backend = _routed(backend, pairs, sparse)
    if backend == "cpu":
        return torch.ops.mi_kernels_cpu.cross_attention_forward(*pairs, seed, sparse)
    if backend in KERNELS:
        return _kernel(backend, 0).forward(*pairs, seed, sparse)
    block = None if backend == "reference" else BLOCK_BYTES
    every: Any = zip(*pairs, seed.unbind(), [sparse] * len(query), [block] * len(query), strict=True)
    found = [reference.forward(*pair) for pair in every]
    return [out for out, _ in found] + [stat for _, stat in found]


@outside_autocast
def backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    stat: Any,
    query_lengths: Any,
    key_lengths: Any,
    causal_offset: Any,
    scale: Any,
    dropout_p: Any,
    seed: Any,
    sparse: Any,
    backend: Any,
) -> list[Tensor]:
    rule = (query_lengths, key_lengths, causal_offset, scale, dropout_p)
    pairs = (grad_out, query, key, value)
    backend = _routed(backend, (query, key, value, *rule), sparse)
    if backend == "cpu":
        return torch.ops.mi_kernels_cpu.cross_attention_backward(*pairs, out, stat, *rule, seed, sparse)
    if backend in KERNELS:
        return _kernel(backend, 1).backward(*pairs, out, stat, *rule, seed, sparse)
    block = None if backend == "reference" else BLOCK_BYTES
    every: Any = zip(*pairs, stat, *rule, seed.unbind(), [sparse] * len(query), [block] * len(query), strict=True)
    found = [reference.backward(*pair) for pair in every]
    return [gradients[side] for side in range(3) for gradients in found]


def _forward_operator(
    query: Any, key: Any, value: Any, query_lengths: Any, key_lengths: Any, causal_offset: Any, numbers: Any, *rest: Any
) -> list[Tensor]:
    return forward(query, key, value, query_lengths, key_lengths, causal_offset, *numbers.tolist(), *rest)


def _backward_operator(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    stat: Any,
    query_lengths: Any,
    key_lengths: Any,
    causal_offset: Any,
    numbers: Any,
    *rest: Any,
) -> list[Tensor]:
    pairs = (grad_out, query, key, value, out, stat, query_lengths, key_lengths)
    return backward(*pairs, causal_offset, *numbers.tolist(), *rest)


for _key in ("CPU", "CUDA"):
    library.impl("cross_attention_forward", _forward_operator, _key)
    library.impl("cross_attention_backward", _backward_operator, _key)
