"""Autograd of the LSTM scan. Callers check the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import autograd as handover
from ..common import transforms
from ..common.precision import outside_autocast
from . import dispatch, reference
from .problem import Layer, Projection, Scan, Slopes, Start, States
from .schema import NEED_BIAS, NEED_C0, NEED_H0, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_X


class _StandIn(torch.autograd.Function):
    """A placeholder for `t` in the autograd graph that holds no memory.

    Second derivatives need the position of the gates in the graph, but not their values. The gates (4 H numbers per
    step, besides the 6 H that are kept) can therefore be freed after the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # do not create zeros for outputs without a gradient
        return t.new_zeros(()).expand(t.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        return g


def _folded(grouped: bool, *tensors: Tensor | None) -> list[Any]:
    """Makes tensors contiguous and adds a group dimension if they have none."""
    return [None if t is None else (t if grouped else t.unsqueeze(0)).contiguous() for t in tensors]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, steps: int, keep: bool, backend: str, *tensors: Tensor | None) -> Any:
        problem = Scan(*tensors)  # type: ignore[arg-type]
        grouped = problem.weight.dim() == 3
        full = Scan(*_folded(grouped, *problem))
        if torch.compiler.is_compiling():
            h, c, activations = torch.ops.mi_kernels.lstm_scan_forward(*full, steps, keep, backend)
        else:
            h, c, activations = dispatch.forward(full, steps, keep, backend)
        if not grouped:
            h, c = h.squeeze(0), c.squeeze(0)
        ctx.save_for_backward(*problem._replace(gates=stand_in), h, c, activations)
        ctx.inputs, ctx.dtype, ctx.backend = problem.gates.shape[-2], problem.gates.dtype, backend
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, g_h: Tensor | None, g_c: Tensor | None) -> Any:
        none = (None,) * 4
        if g_h is None and g_c is None:
            return *none, *(None,) * len(Scan._fields)
        *tensors, h, c, activations = ctx.saved_tensors
        problem, needed = Scan(*tensors), ctx.needs_input_grad[4:-1]
        if handover.needs_formula((g_h, g_c)):
            again = partial(_rescanned, lengths=problem.lengths, activations=activations)
            found = handover.differentiable_gradients(again, problem.differentiable, needed, (g_h, g_c))
            return *none, *found, None
        grouped, wanted = problem.weight.dim() == 3, needed[1:]
        needs = handover.needs(wanted, (NEED_WEIGHT, NEED_BIAS, NEED_H0, NEED_C0))
        start, states, slopes = _saved(problem, h, c, activations, g_h, g_c)
        if torch.compiler.is_compiling():
            run = torch.ops.mi_kernels.lstm_scan_backward
            d_gates, *others = run(*start, *states, *slopes, ctx.inputs, needs, ctx.backend)
        else:
            d_gates, *others = dispatch.backward(start, states, slopes, ctx.inputs, needs, ctx.backend)
        unfold = lambda t: (t if grouped else t.squeeze(0)).to(ctx.dtype)  # noqa: E731
        gradients = [unfold(t) if want else None for t, want in zip(others, wanted, strict=True)]
        return *none, unfold(d_gates), *gradients, None


def _saved(
    problem: Scan, h: Tensor, c: Tensor, activations: Tensor, g_h: Tensor | None, g_c: Tensor | None
) -> tuple[Start, States, Slopes]:
    """The arguments of the backward operator, in the operators' shapes (which the activations already have)."""
    fold = partial(_folded, problem.weight.dim() == 3)
    start = Start(*fold(problem.weight, problem.h0, problem.c0, problem.lengths))
    h, c = fold(h, c)
    return start, States(h, c, activations), Slopes(*fold(g_h, g_c))


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: bool, backend: str, *tensors: Tensor | None) -> Any:
        problem = Layer(*tensors)  # type: ignore[arg-type]
        grouped = problem.weight_hh.dim() == 3
        full = Layer(*_folded(grouped, *problem))
        if torch.compiler.is_compiling():
            h, c, activations = torch.ops.mi_kernels.lstm_forward(*full, keep, backend)
        else:
            h, c, activations = dispatch.lstm_forward(full, keep, backend)
        if not grouped:
            h, c = h.squeeze(0), c.squeeze(0)
        ctx.save_for_backward(*problem, h, c, activations)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, g_h: Tensor | None, g_c: Tensor | None) -> Any:
        if g_h is None and g_c is None:
            return None, None, *(None,) * len(Layer._fields)
        *tensors, h, c, activations = ctx.saved_tensors
        problem, needed = Layer(*tensors), ctx.needs_input_grad[2:-1]
        if handover.needs_formula((g_h, g_c)):
            again = partial(_projected_again, lengths=problem.lengths, activations=activations)
            found = handover.differentiable_gradients(again, problem.differentiable, needed, (g_h, g_c))
            return None, None, *found, None
        grouped = problem.weight_hh.dim() == 3
        bits = (NEED_X, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_BIAS, NEED_H0, NEED_C0)
        needs = handover.needs(needed, bits)
        given = Projection(*_folded(grouped, problem.x, problem.weight_ih))
        start, states, slopes = _saved(problem.scan(problem.x), h, c, activations, g_h, g_c)
        if torch.compiler.is_compiling():
            run = torch.ops.mi_kernels.lstm_backward
            gradients = run(*given, *start, *states, *slopes, needs, ctx.backend)
        else:
            gradients = dispatch.lstm_backward(given, start, states, slopes, needs, ctx.backend)
        unfold = lambda t: (t if grouped else t.squeeze(0)).to(problem.x.dtype)  # noqa: E731
        return None, None, *(unfold(t) if needs & bit else None for t, bit in zip(gradients, bits, strict=True)), None


@outside_autocast
def _rescanned(
    gates: Tensor, weight: Tensor, *rest: Tensor | None, lengths: Tensor | None, activations: Any
) -> tuple[Tensor, Tensor]:
    """Recomputes h and c from the differentiable inputs of a scan."""
    grouped = weight.dim() == 3
    problem = Scan(*_folded(grouped, gates, weight, *rest, lengths))
    h, c = reference.rescan(problem, activations)
    return (h, c) if grouped else (h.squeeze(0), c.squeeze(0))


@outside_autocast
def _projected(x: Tensor, weight: Tensor, lengths: Tensor | None) -> Tensor:
    """The gates of an input, with zeros beyond the lengths, because NaN times a zero gradient would be NaN."""
    if lengths is not None:
        x = x.where(reference.valid_steps(lengths, x.shape[-2]), 0)
    return x @ weight.mT.unsqueeze(-3) if weight.dim() == 3 else x @ weight.mT


def _projected_again(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *rest: Tensor | None, lengths: Tensor | None, activations: Any
) -> tuple[Tensor, Tensor]:
    """Recomputes h and c from the differentiable inputs of a layer."""
    gates = _projected(x, weight_ih, lengths)
    return _rescanned(gates, weight_hh, *rest, lengths=lengths, activations=activations)


def _keeps(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be needed."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def scan(problem: Scan, steps: int, backend: str) -> tuple[Tensor, Tensor]:
    """h and c in fp32 (fp64 for fp64 inputs), with a group dimension if the weight has one."""
    if transforms.active():
        run, formula = partial(_scan, steps=steps, backend=backend), partial(_defined_scan, steps=steps)
        return _transformed(run, formula, problem.weight.dim() == 3, problem)
    return _scan(problem, steps=steps, backend=backend)


def _scan(problem: Scan, *, steps: int, backend: str) -> tuple[Tensor, Tensor]:
    gates, keep = problem.gates, _keeps(*problem.differentiable)
    twice = keep and not torch.compiler.is_compiling()
    stand_in = _StandIn.apply(gates) if twice and gates.requires_grad else gates.new_zeros(()).expand(gates.shape)
    return _Scan.apply(stand_in, steps, keep, backend, *problem)


@outside_autocast
def _defined_scan(problem: Scan, *, steps: int) -> tuple[Tensor, Tensor]:
    """The formula that `_scan` computes, with a group dimension."""
    return reference.scan(problem, steps)[:2]


def lstm(problem: Layer, backend: str) -> tuple[Tensor, Tensor]:
    """h and c in fp32 (fp64 for fp64 inputs), with a group dimension if the weights have one."""
    if transforms.active():
        return _transformed(partial(_lstm, backend=backend), _defined_lstm, problem.weight_hh.dim() == 3, problem)
    return _lstm(problem, backend=backend)


def _lstm(problem: Layer, *, backend: str) -> tuple[Tensor, Tensor]:
    return _LSTM.apply(_keeps(*problem.differentiable), backend, *problem)


def _defined_lstm(problem: Layer) -> tuple[Tensor, Tensor]:
    """The formula that `_lstm` computes, with a group dimension."""
    gates = _projected(problem.x, problem.weight_ih, problem.lengths)
    return _defined_scan(problem.scan(gates), steps=problem.x.shape[2])


def _transformed(
    run: Callable[..., tuple[Tensor, Tensor]],
    formula: Callable[..., tuple[Tensor, Tensor]],
    grouped: bool,
    problem: Scan | Layer,
) -> tuple[Tensor, Tensor]:
    """`run` under the active torch.func transforms. vmap dimensions become groups, because every group has its own
    weights. `run` and `formula` take a problem whose tensors all have a group dimension."""

    def on_groups(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Sequence[Tensor]]:
        def on_lead(lead: tuple[int, ...], *given: Tensor | None) -> Sequence[Tensor]:
            d = len(lead)
            own = [None if t is None else t if grouped else t.unsqueeze(d) for t in given]
            batch = own[0].shape[: d + 1] if own[0] is not None else ()
            fields: list[Any] = [None if t is None else t.flatten(0, d) for t in own]
            found = function(type(problem)(*fields))
            return [(o.unflatten(0, batch) if grouped else o.unflatten(0, batch).squeeze(d)) for o in found]

        return on_lead

    h, c = transforms.apply(transforms.Operator(on_groups(run), on_groups(formula)), *problem)
    return h, c
