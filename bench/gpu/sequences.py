"""Attention between sequences and LSTM layers on a device, beside torch's own and the public formulations."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import mi_kernels as mk
from bench import attention as cpu_attention
from bench import lstm as cpu_lstm
from bench.attention import Attend, Pairs
from mi_kernels.ops.cross_attention.cuda import MOST_FEATURES

from . import exact
from .problem import Problem
from .problems import backends


def _energy(*outputs: Tensor) -> Tensor:
    """One number that does not cancel."""
    return torch.stack([o.float().square().mean() for o in outputs]).sum()


def attention(
    device: torch.device, batch: int, heads: int, size: int, steps: tuple[int, ...], dtype: torch.dtype, ragged: bool
) -> Problem:
    """All directed pairs between sequences of `steps`, or self-attention of one; `ragged`: key lengths of half of T."""
    drawn = cpu_attention.directed(batch, heads, size, steps, half=ragged)
    masks = [None if m is None else m.to(device) for m in drawn.masks()]
    sides = [[t.detach().to(device, dtype).requires_grad_() for t in side] for side in drawn[:3]]
    lengths = [None if n is None else n.to(device) for n in drawn.key_lengths]
    pairs = Pairs(*sides, lengths, drawn.offsets)

    def energy(attend: Attend) -> Tensor:
        return _energy(*attend(pairs, masks))

    def formula(*leaves: Tensor) -> Tensor:
        n = len(leaves) // 3
        wide = Pairs(*(list(leaves[k * n : (k + 1) * n]) for k in range(3)), lengths, drawn.offsets)
        return torch.stack([o.square().mean() for o in cpu_attention.eager(wide, masks)]).sum()

    leaves = pairs.tensors()
    problem = Problem(
        leaves,
        {},
        lambda: exact.from_formula(formula, leaves),
        flop=14.0 * size * pairs.weights(),
        convention="3.5 times the forward's 4 E a weight",
        moved_bytes=4.0 * sum(t.numel() * t.element_size() for t in leaves),
    )
    for name in [None, *backends(device)]:
        label = "mi_kernels" if name is None else f"mi_kernels {name}"
        if name == "cuda" and size > MOST_FEATURES:
            problem.absent[label] = f"its heads have at most {MOST_FEATURES} features"
            continue
        problem.contenders[label] = partial(energy, partial(cpu_attention.ours, backend=name))
    problem.contenders["SDPA"] = partial(energy, cpu_attention.sdpa)
    problem.contenders["eager"] = partial(energy, cpu_attention.eager)
    return problem


def lstm(device: torch.device, batch: int, steps: int, hidden: int) -> Problem:
    """One layer with an input as wide as its state, fp32."""
    torch.manual_seed(0)
    cell = nn.LSTMCell(hidden, hidden).to(device)
    x = torch.randn(batch, steps, hidden).to(device).requires_grad_()
    module = cpu_lstm.module_of(cell)

    def formula(*leaves: Tensor) -> Tensor:
        parameters = dict(zip(dict(cell.named_parameters()), leaves[1:], strict=True))
        h = c = leaves[0].new_zeros(batch, hidden)
        states = []
        for t in range(steps):
            h, c = torch.func.functional_call(cell, parameters, (leaves[0][:, t], (h, c)))
            states.append(h)
        return torch.stack(states, 1).square().mean()

    leaves = [x, *cell.parameters()]
    problem = Problem(
        leaves,
        {},
        lambda: exact.from_formula(formula, leaves),
        flop=48.0 * batch * steps * hidden**2,
        convention="48 B T H^2: forward, and twice that back",
        moved_bytes=8.0 * batch * steps * hidden * 4,
    )

    def ours(name: str) -> Tensor:
        with mk.use_backend(name):
            return _energy(cpu_lstm.ours(cell, x))

    for name in backends(device):
        if name == "triton":
            problem.absent["mi_kernels triton"] = "the scan has no Triton kernel"
            continue
        problem.contenders[f"mi_kernels {name}"] = partial(ours, name)
    problem.contenders["nn.LSTM"] = lambda: _energy(cpu_lstm.by_module(module, cell, x))
    problem.contenders["LSTMCell loop, eager"] = lambda: _energy(cpu_lstm.by_cells(cell, x))
    return problem
