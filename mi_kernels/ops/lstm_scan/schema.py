"""Operators of the LSTM scan: schemas, definitions and shape functions. Imports only torch.

    z_t = gates_t + W h_{t-1} + bias           rows of W [4H, H] in torch's order i, f, g, o
    i, f, o = sigmoid(z), g = tanh(z),   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)

gates [G, B, S, 4H]; weight [G, 4H, H]; bias [G, 4H] or None; h0, c0 [G, B, H] or None (zeros); lengths [G, B] int64 or
None. The scan runs `steps` T >= S steps; beyond S there is no input and z_t = W h_{t-1} + bias. Beyond the length of a
row, h and c are zero, whatever the gates contain. Arithmetic and results are fp32, fp64 for fp64 inputs.

lstm_scan_forward  -> h [G, B, T, H], c [G, B, T, H] and, with `keep`, the activations i, f, g, o [G, B, T, 4H] for the
backward pass (zero beyond the length of a row); without `keep`, an empty tensor.
lstm_scan_backward -> gradients of gates (S = `inputs` steps), weight, bias, h0 and c0 for incoming gradients g_h and
g_c (None: zero). With d_t the gradient of z_t, one sweep from the last step to the first computes:

    dh = g_h,t + W^T d_{t+1},   dc = g_c,t + f_{t+1} dc_{t+1} + dh o (1 - tanh^2 c_t)
    d_t = [dc g i (1 - i), dc c_{t-1} f (1 - f), dc i (1 - g^2), dh tanh(c_t) o (1 - o)]
    dW = sum_t d_t h_{t-1}^T, a matmul over many steps at a time;   dbias = sum_t d_t

lstm_forward and lstm_backward take x [G, B, T, D] and the input weight V [G, 4H, D] instead of the gates V x_t;
lstm_backward returns gradients of x, V, weight, bias, h0 and c0. Values of x beyond the length of a row are ignored.

    dx_t = V^T d_t,   dV = sum_t d_t x_t^T

Bits of `needs` select the gradients to compute besides that of the gates; the others are empty. `backend` "" is the
automatic choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import schema, split
from ..common.dtypes import accumulate_dtype
from .problem import Layer, Projection, Scan, Slopes, Start, States

# csrc/lstm_scan/schema.h repeats these values; tests/ops/common/test_schemas.py compares the two.
NEED_WEIGHT, NEED_BIAS, NEED_H0, NEED_C0, NEED_X, NEED_INPUT_WEIGHT = 1, 2, 4, 8, 16, 32

library = torch.library.Library("mi_kernels", "FRAGMENT")
library.define(f"lstm_scan_forward({schema(Scan)}, SymInt steps, bool keep, str backend) -> (Tensor, Tensor, Tensor)")
library.define(f"lstm_forward({schema(Layer)}, bool keep, str backend) -> (Tensor, Tensor, Tensor)")
_backward = f"{schema(Start, States)}, {schema(Slopes, prefix='g_')}"
library.define(
    f"lstm_scan_backward({_backward}, SymInt inputs, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"lstm_backward({schema(Projection)}, {_backward}, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _states(like: Tensor, steps: int, hidden: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, c and the activations of `like` [G, B, *, *]."""
    groups, batch = like.shape[:2]
    empty = lambda *shape: like.new_empty(shape, dtype=accumulate_dtype(like.dtype))  # noqa: E731
    state = (groups, batch, steps, hidden)
    return empty(*state), empty(*state), empty(groups, batch, steps, 4 * hidden) if keep else empty(0)


def _gradients(h: Tensor, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the recurrent weight, the bias, h0 and c0."""
    groups, batch, _, hidden = h.shape
    wanted = lambda bit, *shape: h.new_empty(shape if needs & bit else (0,))  # noqa: E731
    return (
        wanted(NEED_WEIGHT, groups, 4 * hidden, hidden),
        wanted(NEED_BIAS, groups, 4 * hidden),
        wanted(NEED_H0, groups, batch, hidden),
        wanted(NEED_C0, groups, batch, hidden),
    )


@torch.library.register_fake("mi_kernels::lstm_scan_forward", lib=library)
def _(*arguments: Any) -> Any:
    problem, steps, keep, _ = split(arguments, Scan)
    return _states(problem.gates, steps, problem.weight.shape[-1], keep)


@torch.library.register_fake("mi_kernels::lstm_scan_backward", lib=library)
def _(*arguments: Any) -> Any:
    _, states, _, inputs, needs, _ = split(arguments, Start, States, Slopes)
    groups, batch, _, width = states.activations.shape
    return states.h.new_empty((groups, batch, inputs, width)), *_gradients(states.h, needs)


@torch.library.register_fake("mi_kernels::lstm_forward", lib=library)
def _(*arguments: Any) -> Any:
    problem, keep, _ = split(arguments, Layer)
    return _states(problem.x, problem.x.shape[2], problem.weight_hh.shape[-1], keep)


@torch.library.register_fake("mi_kernels::lstm_backward", lib=library)
def _(*arguments: Any) -> Any:
    given, _, (h, _, _), _, needs, _ = split(arguments, Projection, Start, States, Slopes)
    return (
        h.new_empty(given.x.shape if needs & NEED_X else (0,)),
        h.new_empty(given.weight_ih.shape if needs & NEED_INPUT_WEIGHT else (0,)),
        *_gradients(h, needs),
    )
