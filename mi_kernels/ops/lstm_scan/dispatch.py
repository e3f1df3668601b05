"""Runs the operators of the LSTM scan on a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import backends, requested_backend, resolve
from ..common.precision import outside_autocast
from . import reference
from .schema import NEED_INPUT_WEIGHT, NEED_X, library


def _backend(device: torch.device, dtype: torch.dtype, requested: str) -> str:
    """"cpu", "cuda" or "reference". There is no Triton kernel: on a GPU the CUDA C++ one is the automatic choice."""
    name = resolve("lstm_scan", device, requested or None)
    named = requested or requested_backend()
    if named == "triton":
        raise RuntimeError("backend 'triton' was asked for and cannot run lstm_scan: it has no Triton kernel")
    if named == "cuda" and dtype == torch.float64:
        raise RuntimeError(f"backend 'cuda' was asked for and cannot run lstm_scan: it has no kernel for {dtype}")
    if named is None and device.type == "cuda":
        return "cuda" if dtype != torch.float64 and backends()["cuda"] == "available" else "reference"
    return name if name in ("cpu", "cuda") else "reference"


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@outside_autocast
def forward(
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    steps: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = (gates, weight, bias, h0, c0, lengths, steps, keep)
    name = _backend(gates.device, gates.dtype, backend)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.lstm_scan_forward(*problem)
    if name == "cuda":
        return torch.ops.mi_kernels_cuda.lstm_scan_forward(*problem, _processors(gates.device))
    return reference.forward(*problem)


@outside_autocast
def backward(
    weight: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    h: Tensor,
    c: Tensor,
    activations: Tensor,
    g_h: Tensor | None,
    g_c: Tensor | None,
    inputs: int,
    needs: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = (weight, h0, c0, lengths, h, c, activations, g_h, g_c, inputs, needs)
    name = _backend(h.device, h.dtype, backend)
    if name == "cpu":
        return torch.ops.mi_kernels_cpu.lstm_scan_backward(*problem)
    if name == "cuda":
        return torch.ops.mi_kernels_cuda.lstm_scan_backward(*problem, _processors(h.device))
    return reference.backward(*problem)


def _projects(x: Tensor, backend: str) -> bool:
    """Whether the input is projected by the scan itself; where torch may multiply in 16 bits it is faster at that."""
    short = x.dtype in (torch.bfloat16, torch.float16) or torch.get_float32_matmul_precision() == "medium"
    return _backend(x.device, x.dtype, backend) == "cpu" and not short


@outside_autocast
def lstm_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (weight_hh, bias, h0, c0, lengths)
    if _projects(x, backend):
        return torch.ops.mi_kernels_cpu.lstm_forward(x, weight_ih, *rest, keep)
    gates = x @ weight_ih.mT.unsqueeze(-3)
    return forward(gates, *rest, x.shape[2], keep, backend)


def lstm_backward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    h: Tensor,
    c: Tensor,
    activations: Tensor,
    g_h: Tensor | None,
    g_c: Tensor | None,
    needs: int,
    backend: str,
) -> tuple[Tensor, ...]:
    rest = (weight_hh, h0, c0, lengths, h, c, activations, g_h, g_c)
    if _projects(x, backend):
        return torch.ops.mi_kernels_cpu.lstm_backward(x, weight_ih, *rest, needs)
    d, *others = backward(*rest, x.shape[2], needs & ~(NEED_X | NEED_INPUT_WEIGHT), backend)
    return *reference.through_projection(x, weight_ih, lengths, d, needs), *others


for _key in ("CPU", "CUDA"):
    library.impl("lstm_forward", lstm_forward, _key)
    library.impl("lstm_backward", lstm_backward, _key)
    library.impl("lstm_scan_forward", forward, _key)
    library.impl("lstm_scan_backward", backward, _key)
