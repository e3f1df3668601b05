"""Autograd of the LSTM scan. Callers validate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import autograd as handover
from . import dispatch, reference
from .schema import NEED_BIAS, NEED_C0, NEED_H0, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_X


class _StandIn(torch.autograd.Function):
    """A tensor without memory of its own that has the place of `t` in autograd's graph: a second derivative passes
    through it, so that the gates, 4 H numbers a step beside 6 H that are kept, can go after the forward pass."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # the first derivative does not come this way: no zeros to add to it
        return t.new_zeros(()).expand(t.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        return g


def _folded(grouped: bool, *tensors: Tensor | None) -> list[Any]:
    """With a group dimension, contiguous."""
    return [None if t is None else (t if grouped else t.unsqueeze(0)).contiguous() for t in tensors]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, stand_in, weight, bias, h0, c0, lengths, steps, keep, backend):
        grouped = weight.dim() == 3
        run = torch.ops.mi_kernels.lstm_scan_forward if torch.compiler.is_compiling() else dispatch.forward
        problem = [*_folded(grouped, gates, weight, bias, h0, c0, lengths), steps, keep, backend]
        h, c, activations = run(*problem)
        if not grouped:
            h, c = h.squeeze(0), c.squeeze(0)
        ctx.save_for_backward(stand_in, weight, bias, h0, c0, lengths, h, c, activations)
        ctx.inputs, ctx.dtype, ctx.backend = gates.shape[-2], gates.dtype, backend
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx, g_h, g_c):
        if g_h is None and g_c is None:
            return (None,) * 10
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            stand_in, weight, bias, h0, c0, lengths, *_, activations = ctx.saved_tensors
            again = partial(_rescanned, lengths=lengths, activations=activations)
            d_gates, *others = _differentiable_gradients(again, (stand_in, weight, bias, h0, c0), g_h, g_c)
            return d_gates, None, *others, None, None, None, None
        _, weight, _, h0, c0, lengths, h, c, activations = ctx.saved_tensors
        grouped = weight.dim() == 3
        bits = (NEED_WEIGHT, NEED_BIAS, NEED_H0, NEED_C0)
        wanted = ctx.needs_input_grad[2:6]
        needs = handover.needs(wanted, bits)
        run = torch.ops.mi_kernels.lstm_scan_backward if torch.compiler.is_compiling() else dispatch.backward
        saved = [*_folded(grouped, weight, h0, c0, lengths, h, c), activations]
        problem = [*saved, *_folded(grouped, g_h, g_c), ctx.inputs, needs, ctx.backend]
        d_gates, *others = run(*problem)
        unfold = lambda t: (t if grouped else t.squeeze(0)).to(ctx.dtype)  # noqa: E731
        gradients = [unfold(t) if want else None for t, want in zip(others, wanted, strict=True)]
        return unfold(d_gates), None, *gradients, None, None, None, None


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_ih, weight_hh, bias, h0, c0, lengths, keep, backend):
        grouped = weight_hh.dim() == 3
        run = torch.ops.mi_kernels.lstm_forward if torch.compiler.is_compiling() else dispatch.lstm_forward
        problem = [*_folded(grouped, x, weight_ih, weight_hh, bias, h0, c0, lengths), keep, backend]
        h, c, activations = run(*problem)
        if not grouped:
            h, c = h.squeeze(0), c.squeeze(0)
        ctx.save_for_backward(x, weight_ih, weight_hh, bias, h0, c0, lengths, h, c, activations)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx, g_h, g_c):
        if g_h is None and g_c is None:
            return (None,) * 9
        x, weight_ih, weight_hh, bias, h0, c0, lengths, h, c, activations = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = partial(_projected_again, lengths=lengths, activations=activations)
            inputs = (x, weight_ih, weight_hh, bias, h0, c0)
            return *_differentiable_gradients(again, inputs, g_h, g_c), None, None, None
        grouped = weight_hh.dim() == 3
        bits = (NEED_X, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_BIAS, NEED_H0, NEED_C0)
        needs = handover.needs(ctx.needs_input_grad, bits)
        run = torch.ops.mi_kernels.lstm_backward if torch.compiler.is_compiling() else dispatch.lstm_backward
        saved = [*_folded(grouped, x, weight_ih, weight_hh, h0, c0, lengths, h, c), activations]
        problem = [*saved, *_folded(grouped, g_h, g_c), needs, ctx.backend]
        found = run(*problem)
        unfold = lambda t: (t if grouped else t.squeeze(0)).to(x.dtype)  # noqa: E731
        return *(unfold(t) if needs & bit else None for t, bit in zip(found, bits, strict=True)), None, None, None


def _rescanned(gates, weight, bias, h0, c0, *, lengths, activations) -> tuple[Tensor, Tensor]:
    grouped = weight.dim() == 3
    problem = [*_folded(grouped, gates, weight, bias, h0, c0, lengths), activations]
    h, c = reference.rescan(*problem)
    return (h, c) if grouped else (h.squeeze(0), c.squeeze(0))


def _projected_again(x, weight_ih, weight_hh, bias, h0, c0, *, lengths, activations) -> tuple[Tensor, Tensor]:
    if lengths is not None:  # NaN times a gradient of zero would still be one
        x = x.where(reference.valid_steps(lengths, x.shape[-2]), 0)
    gates = x @ weight_ih.mT.unsqueeze(-3) if weight_hh.dim() == 3 else x @ weight_ih.mT
    return _rescanned(gates, weight_hh, bias, h0, c0, lengths=lengths, activations=activations)


def _differentiable_gradients(
    outputs_of: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor | None, ...],
    g_h: Tensor | None,
    g_c: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of the inputs, of g_h and of g_c, in plain torch."""
    # Aliases: a tensor that serves twice must not collect the sum of both gradients.
    aliases = [None if t is None else t.view_as(t) for t in inputs]
    device = next(t for t in inputs if t is not None).device.type
    with torch.autocast(device, enabled=False):
        outputs = outputs_of(*aliases)
    used = [(o, g) for o, g in zip(outputs, (g_h, g_c), strict=True) if g is not None]
    wanted = [t is not None and t.requires_grad for t in inputs]
    targets = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad([o for o, _ in used], targets, [g for _, g in used], create_graph=True))
    return tuple(next(found) if want else None for want in wanted)


def _keeps(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def scan(
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    steps: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """h and c in fp32 (fp64 for fp64); with a group dimension where the weight has one."""
    keep = _keeps(gates, weight, bias, h0, c0)
    twice = keep and not torch.compiler.is_compiling()
    stand_in = _StandIn.apply(gates) if twice and gates.requires_grad else gates.new_zeros(()).expand(gates.shape)
    return _Scan.apply(gates, stand_in, weight, bias, h0, c0, lengths, steps, keep, backend or "")


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """h and c in fp32 (fp64 for fp64); with a group dimension where the weights have one."""
    inputs = (x, weight_ih, weight_hh, bias, h0, c0)
    return _LSTM.apply(*inputs, lengths, _keeps(*inputs), backend or "")
