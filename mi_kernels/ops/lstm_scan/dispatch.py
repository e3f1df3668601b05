"""Runs the operators of the LSTM scan on a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import requested_backend, resolve
from . import reference
from .schema import library


def _compiled(device: torch.device, backend: str) -> bool:
    name = resolve("lstm_scan", device, backend or None)
    if name == "triton" and (backend or requested_backend()) == "triton":
        raise RuntimeError("backend 'triton' was asked for and cannot run lstm_scan: it has no Triton kernel")
    return name == "cpu" and hasattr(torch.ops.mi_kernels_cpu, "lstm_scan_forward")


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
    if _compiled(gates.device, backend):
        return torch.ops.mi_kernels_cpu.lstm_scan_forward(*problem)
    with torch.autocast(gates.device.type, enabled=False):
        return reference.forward(*problem)


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
    if _compiled(h.device, backend):
        return torch.ops.mi_kernels_cpu.lstm_scan_backward(*problem)
    with torch.autocast(h.device.type, enabled=False):
        return reference.backward(*problem)


for _key in ("CPU", "CUDA"):
    library.impl("lstm_scan_forward", forward, _key)
    library.impl("lstm_scan_backward", backward, _key)
