"""Runs the operators of the MLP critic on a backend. Kernels are imported on first use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import requested_backend, resolve
from ..common.arguments import split
from ..common.precision import outside_autocast
from . import chunked, cuda
from .problem import Critic, Kept, LogSums, Request, Resources, Score, Slopes
from .schema import library


def backend_for(device: torch.device, requested: str | None, layers: int) -> str:
    """The backend for a critic with `layers` layers on `device`. Raises RuntimeError if a named backend has no kernel
    for it."""
    if layers > 3 and requested is None and requested_backend() is None:
        return "chunked"
    name = resolve("mlp_critic", device, requested)
    if name in ("cpu", "triton", "cuda") and layers > 3:
        raise RuntimeError(
            f"backend {name!r} was requested but only supports critics of one or two hidden layers, got {layers - 1}"
        )
    return name


@outside_autocast
def forward(critic: Critic, score: Score, request: Request, resources: Resources) -> tuple[Tensor, ...]:
    """The six statistics of schema.py and the tensors saved for backward."""
    backend = resources.backend
    if backend == "cpu":
        return torch.ops.mi_kernels_cpu.mlp_critic_forward(*critic, *score, *request)
    if backend == "triton":
        from . import triton_forward

        return triton_forward.forward(*critic, *score, *request, resources.memory_budget)
    if backend == "cuda":
        return cuda.forward(*critic, *score, *request)
    found = chunked.forward(critic, score, request, resources.memory_budget)
    return *found, found[0].new_empty(0), critic.u.new_empty(0, dtype=torch.int32)


@outside_autocast
def backward(
    critic: Critic,
    score: Score,
    sums: LogSums,
    slopes: Slopes,
    kept: Kept,
    need_parameters: bool,
    resources: Resources,
) -> list[Tensor]:
    """Gradients of u and v, followed by those of all weights and then of all biases if they are needed."""
    backend, budget = resources.backend, resources.memory_budget
    if backend == "cpu":
        return torch.ops.mi_kernels_cpu.mlp_critic_backward(*critic, *score, *sums, *slopes, *kept, need_parameters)
    if backend == "triton":
        from . import triton_backward

        return triton_backward.backward(*critic, *score, *sums, slopes, *kept, need_parameters, budget)
    if backend == "cuda":
        return cuda.backward(*critic, *score, *sums, slopes, *kept, need_parameters, budget)
    return chunked.backward(critic, score, sums, slopes, need_parameters, budget)


def _forward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    critic, score, request, resources = split(arguments, Critic, Score, Request, Resources)
    return forward(critic, score, request._replace(clip=request.clip.item()), resources)


def _backward_operator(*arguments: Any) -> list[Tensor]:
    *parts, need_parameters, budget, backend = split(arguments, Critic, Score, LogSums, Slopes, Kept)
    return backward(*(*parts, need_parameters, Resources(budget, backend)))


for _key in ("CPU", "CUDA"):
    library.impl("mlp_critic_forward", _forward_operator, _key)
    library.impl("mlp_critic_backward", _backward_operator, _key)
