"""Autograd of the LSTM scan. Callers validate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import autograd as handover
from ..common import transforms
from . import dispatch, reference
from .schema import NEED_BIAS, NEED_C0, NEED_H0, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_X


class _StandIn(torch.autograd.Function):
    """Takes the place of `t` in autograd's graph without holding memory.

    Second derivatives need that place, but not the values of t: the gates, 4 H numbers a step beside the 6 H that are
    kept, are freed after the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient
        return t.new_zeros(()).expand(t.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        return g


def _folded(grouped: bool, *tensors: Tensor | None) -> list[Any]:
    """Tensors in the operators' shapes: contiguous, and with a group dimension where they have none."""
    return [None if t is None else (t if grouped else t.unsqueeze(0)).contiguous() for t in tensors]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        stand_in: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        steps: int,
        keep: bool,
        backend: str,
    ) -> Any:
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
    def backward(ctx: Any, g_h: Tensor | None, g_c: Tensor | None) -> Any:
        if g_h is None and g_c is None:
            return (None,) * 10
        if handover.needs_formula((g_h, g_c)):
            stand_in, weight, bias, h0, c0, lengths, *_, activations = ctx.saved_tensors
            again = partial(_rescanned, lengths=lengths, activations=activations)
            needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
            inputs = (stand_in, weight, bias, h0, c0)
            d_gates, *others = handover.differentiable_gradients(again, inputs, needed, (g_h, g_c))
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
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        keep: bool,
        backend: str,
    ) -> Any:
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
    def backward(ctx: Any, g_h: Tensor | None, g_c: Tensor | None) -> Any:
        if g_h is None and g_c is None:
            return (None,) * 9
        x, weight_ih, weight_hh, bias, h0, c0, lengths, h, c, activations = ctx.saved_tensors
        if handover.needs_formula((g_h, g_c)):
            again = partial(_projected_again, lengths=lengths, activations=activations)
            inputs, needed = (x, weight_ih, weight_hh, bias, h0, c0), ctx.needs_input_grad[:6]
            return *handover.differentiable_gradients(again, inputs, needed, (g_h, g_c)), None, None, None
        grouped = weight_hh.dim() == 3
        bits = (NEED_X, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_BIAS, NEED_H0, NEED_C0)
        needs = handover.needs(ctx.needs_input_grad, bits)
        run = torch.ops.mi_kernels.lstm_backward if torch.compiler.is_compiling() else dispatch.lstm_backward
        saved = [*_folded(grouped, x, weight_ih, weight_hh, h0, c0, lengths, h, c), activations]
        problem = [*saved, *_folded(grouped, g_h, g_c), needs, ctx.backend]
        found = run(*problem)
        unfold = lambda t: (t if grouped else t.squeeze(0)).to(x.dtype)  # noqa: E731
        return *(unfold(t) if needs & bit else None for t, bit in zip(found, bits, strict=True)), None, None, None


def _rescanned(
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    lengths: Tensor | None,
    activations: Any,
) -> tuple[Tensor, Tensor]:
    grouped = weight.dim() == 3
    problem = [*_folded(grouped, gates, weight, bias, h0, c0, lengths), activations]
    with torch.autocast(weight.device.type, enabled=False):
        h, c = reference.rescan(*problem)
    return (h, c) if grouped else (h.squeeze(0), c.squeeze(0))


def _projected(x: Tensor, weight: Tensor, lengths: Tensor | None) -> Tensor:
    """The gates of an input, 0 beyond its lengths: NaN times a gradient of zero would still be NaN."""
    if lengths is not None:
        x = x.where(reference.valid_steps(lengths, x.shape[-2]), 0)
    with torch.autocast(x.device.type, enabled=False):
        return x @ weight.mT.unsqueeze(-3) if weight.dim() == 3 else x @ weight.mT


def _projected_again(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    lengths: Tensor | None,
    activations: Any,
) -> tuple[Tensor, Tensor]:
    gates = _projected(x, weight_ih, lengths)
    return _rescanned(gates, weight_hh, bias, h0, c0, lengths=lengths, activations=activations)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """h and c in fp32 (fp64 for fp64); with a group dimension where the weight has one."""
    if transforms.active():
        run, formula = partial(_scan, steps=steps, backend=backend), partial(_defined_scan, steps=steps)
        return _transformed(run, formula, weight.dim() == 3, gates, weight, bias, h0, c0, lengths)
    return _scan(gates, weight, bias, h0, c0, lengths, steps=steps, backend=backend)


def _scan(
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    *,
    steps: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    keep = _keeps(gates, weight, bias, h0, c0)
    twice = keep and not torch.compiler.is_compiling()
    stand_in = _StandIn.apply(gates) if twice and gates.requires_grad else gates.new_zeros(()).expand(gates.shape)
    return _Scan.apply(gates, stand_in, weight, bias, h0, c0, lengths, steps, keep, backend)


def _defined_scan(
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    *,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The formula that `_scan` computes, with a group dimension."""
    with torch.autocast(gates.device.type, enabled=False):
        return reference.scan(gates, weight, bias, h0, c0, lengths, steps)[:2]


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """h and c in fp32 (fp64 for fp64); with a group dimension where the weights have one."""
    problem = (x, weight_ih, weight_hh, bias, h0, c0, lengths)
    if transforms.active():
        return _transformed(partial(_lstm, backend=backend), _defined_lstm, weight_hh.dim() == 3, *problem)
    return _lstm(*problem, backend=backend)


def _lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (x, weight_ih, weight_hh, bias, h0, c0)
    return _LSTM.apply(*inputs, lengths, _keeps(*inputs), backend)


def _defined_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The formula that `_lstm` computes, with a group dimension."""
    gates = _projected(x, weight_ih, lengths)
    return _defined_scan(gates, weight_hh, bias, h0, c0, lengths, steps=x.shape[2])


def _transformed(
    run: Callable[..., tuple[Tensor, Tensor]],
    formula: Callable[..., tuple[Tensor, Tensor]],
    grouped: bool,
    *tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run` under the transforms of torch.func that are active; vmap's dimensions become groups, as every group has
    weights of its own. `run` and `formula` take all tensors with a group dimension."""

    def on_groups(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Sequence[Tensor]]:
        def on_lead(lead: tuple[int, ...], *given: Tensor | None) -> Sequence[Tensor]:
            d = len(lead)
            own = [None if t is None else t if grouped else t.unsqueeze(d) for t in given]
            batch = own[0].shape[: d + 1] if own[0] is not None else ()
            found = function(*(None if t is None else t.flatten(0, d) for t in own))
            return [(o.unflatten(0, batch) if grouped else o.unflatten(0, batch).squeeze(d)) for o in found]

        return on_lead

    h, c = transforms.apply(transforms.Operator(on_groups(run), on_groups(formula)), *tensors)
    return h, c
