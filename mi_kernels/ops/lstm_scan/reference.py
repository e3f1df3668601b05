"""The LSTM scan in plain torch, step by step (schema.py has the formulas): 8 G B T H^2 FLOP forward, 16 G B T H^2
backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.precision import outside_autocast
from .problem import Projection, Scan, Slopes, Start, States
from .schema import NEED_BIAS, NEED_C0, NEED_H0, NEED_INPUT_WEIGHT, NEED_WEIGHT, NEED_X

Gates = tuple[Tensor, Tensor, Tensor, Tensor]


def _initial(state: Tensor | None, like: Tensor) -> Tensor:
    """h0 or c0 [G, B, H] for states `like` [G, B, T, H]."""
    return torch.zeros_like(like[:, :, 0]) if state is None else state.to(like.dtype)


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """Whether a step lies within its row's length: [G, B, T, 1]."""
    return (torch.arange(steps, device=lengths.device) < lengths.unsqueeze(-1)).unsqueeze(-1)


def _nonlinear(t: int, z: Tensor) -> Gates:
    i, f, g, o = z.chunk(4, -1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def _run(
    problem: Scan, h: Tensor, c: Tensor, steps: int, activate: Callable[[int, Tensor], Gates]
) -> tuple[Tensor, Tensor, Tensor]:
    gates, weight, bias = problem[:3]
    states, cells, activations = [], [], []
    for t in range(steps):
        z = h @ weight.mT
        if t < gates.shape[2]:
            z = z + gates[:, :, t]
        if bias is not None:
            z = z + bias.unsqueeze(-2)
        i, f, g, o = activate(t, z)
        c = f * c + i * g
        h = o * c.tanh()
        states.append(h)
        cells.append(c)
        activations.append(torch.cat([i, f, g, o], -1))
    return torch.stack(states, 2), torch.stack(cells, 2), torch.stack(activations, 2)


def scan(
    problem: Scan, steps: int, activate: Callable[[int, Tensor], Gates] = _nonlinear
) -> tuple[Tensor, Tensor, Tensor]:
    """h, c and the activations; differentiable any number of times."""
    gates, weight, bias, h0, c0, lengths = problem
    if lengths is not None:
        gates = gates.where(valid_steps(lengths, gates.shape[2]), 0)
    dtype = accumulate_dtype(gates.dtype)
    zeros = gates.new_zeros((*gates.shape[:2], weight.shape[-1]), dtype=dtype)
    h, c = (zeros if state is None else state.to(dtype) for state in (h0, c0))
    bias = None if bias is None else bias.to(dtype)
    wide = problem._replace(gates=gates.to(dtype), weight=weight.to(dtype), bias=bias)
    found = _run(wide, h, c, steps, activate)
    if lengths is None:
        return found
    valid = valid_steps(lengths, steps)
    return found[0].where(valid, 0), found[1].where(valid, 0), found[2].where(valid, 0)


def rescan(problem: Scan, activations: Tensor) -> tuple[Tensor, Tensor]:
    """h and c of a scan whose activations are known; differentiable any number of times in every input.

    The values of the gates do not matter; they only represent the gates in the autograd graph. Let d = 0 be the change
    of a pre-activation z. Then sigmoid(z + d) = s / (s + (1 - s) e^-d) with s = sigmoid(z), and
    tanh(z + d) = (g + tanh d) / (1 + g tanh d) with g = tanh(z).
    """

    def activate(t: int, z: Tensor) -> Gates:
        moves = (z - z.detach()).chunk(4, -1)
        i, f, g, o = (
            a / (a + (1 - a) * (-d).exp()) if k != 2 else (a + d.tanh()) / (1 + a * d.tanh())
            for k, (a, d) in enumerate(zip(activations[:, :, t].chunk(4, -1), moves, strict=True))
        )
        return i, f, g, o

    return scan(problem, activations.shape[2], activate)[:2]


def forward(problem: Scan, steps: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    h, c, activations = scan(problem, steps)
    return h, c, activations if keep else h.new_empty(0)


def backward(
    start: Start, states: States, slopes: Slopes, inputs: int, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, h0, c0, lengths = start
    h, c, activations = states
    steps = h.shape[2]
    weight = weight.to(h.dtype)
    valid = None if lengths is None else valid_steps(lengths, steps)
    g_h, g_c = (None if g is None else (g if valid is None else g.where(valid, 0)).to(h.dtype) for g in slopes)
    c_before = torch.cat([_initial(c0, c).unsqueeze(2), c[:, :, :-1]], 2)
    dh, dc = torch.zeros_like(h[:, :, 0]), torch.zeros_like(h[:, :, 0])
    found = []
    for t in reversed(range(steps)):
        i, f, g, o = activations[:, :, t].chunk(4, -1)
        dh = dh if g_h is None else dh + g_h[:, :, t]
        dc = dc if g_c is None else dc + g_c[:, :, t]
        squashed = c[:, :, t].tanh()
        # past a row's length i, f and o are zero, and so all that follows
        dc = dc + dh * o * (1 - squashed.square())
        d = [dc * g * i * (1 - i), dc * c_before[:, :, t] * f * (1 - f), dc * i * (1 - g.square())]
        found.append(torch.cat([*d, dh * squashed * o * (1 - o)], -1))
        dc = dc * f
        dh = found[-1] @ weight
    # a row of length 0 does not use its initial state
    d_gates = torch.stack(found[::-1], 2)
    h_before = torch.cat([_initial(h0, h).unsqueeze(2), h[:, :, :-1]], 2)
    empty = h.new_empty(0)
    return (
        d_gates[:, :, :inputs].contiguous(),
        d_gates.flatten(1, 2).mT @ h_before.flatten(1, 2) if needs & NEED_WEIGHT else empty,
        d_gates.sum((1, 2)) if needs & NEED_BIAS else empty.clone(),
        dh if needs & NEED_H0 else empty.clone(),
        dc if needs & NEED_C0 else empty.clone(),
    )


@outside_autocast
def through_projection(
    given: Projection, lengths: Tensor | None, d_gates: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of its weight from those of the gates; products use the dtype of x."""
    x, weight = given
    d = d_gates.to(x.dtype)
    dx = (d @ weight.unsqueeze(-3)).to(d_gates.dtype) if needs & NEED_X else d_gates.new_empty(0)
    if not needs & NEED_INPUT_WEIGHT:
        return dx, d_gates.new_empty(0)
    seen = x if lengths is None else x.where(valid_steps(lengths, x.shape[2]), 0)
    return dx, (d.flatten(1, 2).mT @ seen.flatten(1, 2)).to(d_gates.dtype)
