"""Runs the MLP critic's operators on a backend. Kernels are imported when they are first used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import requested_backend, resolve
from ..common.precision import outside_autocast
from . import chunked, cuda
from .schema import Slopes, library


def backend_for(device: torch.device, requested: str | None, layers: int) -> str:
    """The backend that scores a critic of `layers` layers on `device`; raises RuntimeError for a named one that has no
    kernel for it."""
    if layers > 3 and requested is None and requested_backend() is None:
        return "chunked"
    name = resolve("mlp_critic", device, requested)
    if name in ("cpu", "triton", "cuda") and layers > 3:
        raise RuntimeError(
            f"backend {name!r} was asked for and scores critics of one or two hidden layers, got {layers - 1}"
        )
    return name


@outside_autocast
def forward(
    u: Any,
    v: Any,
    weights: Any,
    biases: Any,
    activation: Any,
    output: Any,
    off_diagonal: Any,
    stats: Any,
    clip: Any,
    keep: Any,
    memory_budget: Any,
    backend: Any,
) -> tuple[Tensor, ...]:
    critic = (u, v, weights, biases, activation, output, off_diagonal)
    if backend == "cpu":
        return torch.ops.mi_kernels_cpu.mlp_critic_forward(*critic, stats, clip, keep)
    if backend == "triton":
        from . import triton_forward

        return triton_forward.forward(*critic, stats, clip, keep, memory_budget)
    if backend == "cuda":
        return cuda.forward(*critic, stats, clip, keep)
    found = chunked.forward(*critic, stats, clip, memory_budget)
    return *found, found[0].new_empty(0), u.new_empty(0, dtype=torch.int32)


@outside_autocast
def backward(
    u: Any,
    v: Any,
    weights: Any,
    biases: Any,
    activation: Any,
    output: Any,
    off_diagonal: Any,
    row_lse: Any,
    col_lse: Any,
    grad_positive: Any,
    grad_row_lse: Any,
    grad_col_lse: Any,
    grad_row_sum: Any,
    grad_row_softplus: Any,
    kept_scores: Any,
    kept_masks: Any,
    need_parameters: Any,
    memory_budget: Any,
    backend: Any,
) -> list[Tensor]:
    critic = (u, v, weights, biases, activation, output, off_diagonal, row_lse, col_lse)
    slopes = Slopes(grad_positive, grad_row_lse, grad_col_lse, grad_row_sum, grad_row_softplus)
    if backend == "cpu":
        kept = (kept_scores, kept_masks)
        return torch.ops.mi_kernels_cpu.mlp_critic_backward(*critic, *slopes, *kept, need_parameters)
    if backend == "triton":
        from . import triton_backward

        kept = (kept_scores, kept_masks)
        return triton_backward.backward(*critic, slopes, *kept, need_parameters, memory_budget)
    if backend == "cuda":
        return cuda.backward(*critic, slopes, kept_scores, kept_masks, need_parameters, memory_budget)
    return chunked.backward(*critic, slopes, need_parameters, memory_budget)


def _forward_operator(
    u: Any,
    v: Any,
    weights: Any,
    biases: Any,
    activation: Any,
    output: Any,
    off_diagonal: Any,
    stats: Any,
    clip: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return forward(u, v, weights, biases, activation, output, off_diagonal, stats, clip.item(), *rest)


for _key in ("CPU", "CUDA"):
    library.impl("mlp_critic_forward", _forward_operator, _key)
    library.impl("mlp_critic_backward", backward, _key)
