"""Runs the operators of the LSTM scan on a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...backends import backends, requested_backend, resolve
from ..common.arguments import split
from ..common.precision import outside_autocast
from . import reference
from .problem import Layer, Projection, Scan, Slopes, Start, States
from .schema import NEED_INPUT_WEIGHT, NEED_X, library


def _backend(device: torch.device, dtype: torch.dtype, requested: str) -> str:
    """Returns "cpu", "cuda" or "reference". There is no Triton kernel; on a GPU the CUDA C++ kernel is the default."""
    name = resolve("lstm_scan", device, requested or None)
    named = requested or requested_backend()
    if named == "triton":
        raise RuntimeError("backend 'triton' was requested but cannot run lstm_scan: it has no Triton kernel")
    if named == "cuda" and dtype == torch.float64:
        raise RuntimeError(f"backend 'cuda' was requested but cannot run lstm_scan: it has no kernel for {dtype}")
    if named is None and device.type == "cuda":
        return "cuda" if dtype != torch.float64 and backends()["cuda"] == "available" else "reference"
    return name if name in ("cpu", "cuda") else "reference"


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@outside_autocast
def forward(problem: Scan, steps: int, keep: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    gates = problem.gates
    name = _backend(gates.device, gates.dtype, backend)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.lstm_scan_forward(*problem, steps, keep)
    if name == "cuda":
        return torch.ops.mi_kernels_cuda.lstm_scan_forward(*problem, steps, keep, _processors(gates.device))
    return reference.forward(problem, steps, keep)


@outside_autocast
def backward(
    start: Start, states: States, slopes: Slopes, inputs: int, needs: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = (*start, *states, *slopes, inputs, needs)
    h = states.h
    name = _backend(h.device, h.dtype, backend)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.lstm_scan_backward(*problem)
    if name == "cuda":
        return torch.ops.mi_kernels_cuda.lstm_scan_backward(*problem, _processors(h.device))
    return reference.backward(start, states, slopes, inputs, needs)


def _projects(x: Tensor, backend: str) -> bool:
    """Whether the scan also projects its input. It does not if torch may multiply in 16 bits, because that is
    faster."""
    short = x.dtype in (torch.bfloat16, torch.float16) or torch.get_float32_matmul_precision() == "medium"
    return _backend(x.device, x.dtype, backend) == "cpu" and not short


@outside_autocast
def lstm_forward(problem: Layer, keep: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    x = problem.x
    if _projects(x, backend):
        return torch.ops.mi_kernels_cpu.lstm_forward(*problem, keep)
    return forward(problem.scan(x @ problem.weight_ih.mT.unsqueeze(-3)), x.shape[2], keep, backend)


def lstm_backward(
    given: Projection, start: Start, states: States, slopes: Slopes, needs: int, backend: str
) -> tuple[Tensor, ...]:
    if _projects(given.x, backend):
        return torch.ops.mi_kernels_cpu.lstm_backward(*given, *start, *states, *slopes, needs)
    recurrent = needs & ~(NEED_X | NEED_INPUT_WEIGHT)
    d, *others = backward(start, states, slopes, given.x.shape[2], recurrent, backend)
    return *reference.through_projection(given, start.lengths, d, needs), *others


_OPERATORS: dict[str, tuple[Callable[..., Any], tuple[type, ...]]] = {
    "lstm_scan_forward": (forward, (Scan,)),
    "lstm_scan_backward": (backward, (Start, States, Slopes)),
    "lstm_forward": (lstm_forward, (Layer,)),
    "lstm_backward": (lstm_backward, (Projection, Start, States, Slopes)),
}


def _operator(function: Callable[..., Any], kinds: tuple[type, ...]) -> Callable[..., Any]:
    return lambda *arguments: function(*split(arguments, *kinds))


for _name, (_function, _kinds) in _OPERATORS.items():
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _operator(_function, _kinds), _key)
