"""Runs the attention operators on a backend. Kernels are imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...backends import requested_backend, resolve, usable
from ..common.arguments import split
from ..common.precision import outside_autocast
from . import cuda, reference, sdpa
from .problem import OperatorRule, Pairs, Results, Rule
from .schema import library

BLOCK_BYTES = 32 << 20
# backend -> modules with forward(query, ..., sparse) and backward(grad_out, ..., sparse), the operators' own arguments
KERNELS = {"triton": ("triton_forward", "triton_backward"), "cuda": ("cuda", "cuda"), "sdpa": ("sdpa", "sdpa")}
AUTOMATIC = "gpu"  # on a GPU without a named backend; `_routed` chooses the kernels for each call


def _kernel(name: str, direction: int) -> ModuleType:
    return importlib.import_module(f"{__package__}.{KERNELS[name][direction]}")


def backend_for(device: torch.device, requested: str | None) -> str:
    """The backend for attention on `device`. Raises RuntimeError if a named backend cannot run there."""
    name = resolve("cross_attention", device, requested)
    return AUTOMATIC if name == "triton" and (requested or requested_backend()) is None else name


def _routed(backend: str, pairs: Pairs, rule: Rule) -> str:
    """Chooses the kernels of a call: CUDA C++ for heads so narrow that tensor cores would mostly multiply padding,
    torch's flash attention if it computes the same function, otherwise the grouped Triton kernels. Forward and backward
    may differ."""
    if backend != AUTOMATIC:
        return backend
    if cuda.fits(pairs.query, pairs.value) and usable("cuda"):
        return "cuda"
    return "sdpa" if sdpa.suits(*pairs[:5], *rule[:3], sparse=rule.sparse) else "triton"


def _rules(pairs: Pairs, rule: Rule) -> tuple[Any, ...]:
    """The kernel arguments that follow the sequences."""
    return (pairs.query_lengths, pairs.key_lengths, *rule[:3], pairs.seed, rule.sparse)


@outside_autocast
def forward(pairs: Pairs, rule: Rule, backend: str) -> list[Tensor]:
    """The outputs of all pairs, followed by their statistics."""
    backend = _routed(backend, pairs, rule)
    if backend == "cpu":
        return torch.ops.mi_kernels_cpu.cross_attention_forward(*pairs[:3], *_rules(pairs, rule))
    if backend in KERNELS:
        return _kernel(backend, 0).forward(*pairs[:3], *_rules(pairs, rule))
    block = None if backend == "reference" else BLOCK_BYTES
    found = [reference.forward(pair, block) for pair in pairs.each(rule)]
    return [out for out, _ in found] + [stat for _, stat in found]


@outside_autocast
def backward(grad_out: list[Tensor], pairs: Pairs, results: Results, rule: Rule, backend: str) -> list[Tensor]:
    """All dq, all dk, all dv."""
    backend = _routed(backend, pairs, rule)
    if backend == "cpu":
        run: Any = torch.ops.mi_kernels_cpu.cross_attention_backward
        return run(grad_out, *pairs[:3], *results, *_rules(pairs, rule))
    if backend in KERNELS:
        return _kernel(backend, 1).backward(grad_out, *pairs[:3], *results, *_rules(pairs, rule))
    block = None if backend == "reference" else BLOCK_BYTES
    each = zip(grad_out, pairs.each(rule), results.stat, strict=True)
    found = [reference.backward(g, pair, stat, block) for g, pair, stat in each]
    return [gradients[side] for side in range(3) for gradients in found]


def _forward_operator(*arguments: Any) -> list[Tensor]:
    pairs, rule, backend = split(arguments, Pairs, OperatorRule)
    return forward(pairs, rule.rule(), backend)


def _backward_operator(grad_out: list[Tensor], *arguments: Any) -> list[Tensor]:
    pairs, results, rule, backend = split(arguments, Pairs, Results, OperatorRule)
    return backward(grad_out, pairs, results, rule.rule(), backend)


for _key in ("CPU", "CUDA"):
    library.impl("cross_attention_forward", _forward_operator, _key)
    library.impl("cross_attention_backward", _backward_operator, _key)
