"""The gated memory of a Memory Fusion Network as one node of the autograd graph.

    a_t = ReLU(fixed_t + u_{t-1} W) * kept_t
    r_t = sigmoid(a_t[:, :n] V_r + b_r),   w_t = sigmoid(a_t[:, n:] V_w + b_w)
    u_t = r_t * u_{t-1} + w_t * p_t,       u_0 = 0

Autograd would record a dozen operations per step and multiply each step's weight gradients on their own. Here the
backward pass steps through the memory's gradient alone, and the weights' gradients are one product over all steps each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GatedMemory(torch.autograd.Function):
    """u of all steps [T, B, M] of fixed [T, B, n + m], proposals p [T, B, M], W [M, n + m], V_r [n, M], b_r [M],
    V_w [m, M], b_w [M], and dropout factors kept [T, B, n + m] or None. First derivatives in reverse mode only."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:
        fixed, proposals, from_memory, retain, retain_bias, update, update_bias, kept = tensors
        steps, rows, width = proposals.shape
        split = len(retain)
        active = torch.empty_like(fixed)
        gates = fixed.new_empty(steps, 2, rows, width)
        memory = fixed.new_zeros(steps + 1, rows, width)
        states, factors = memory.unbind(), [None] * steps if kept is None else kept.unbind()
        halves = zip(*(part.unbind() for part in active.split((split, active.shape[2] - split), 2)), strict=True)
        both = zip(gates.unbind(), *(gates[:, k].unbind() for k in (0, 1)), strict=True)
        each = zip(fixed.unbind(), proposals.unbind(), active.unbind(), halves, both, factors, strict=True)
        for t, (given, proposal, now, (first, second), (pair, keep, write), factor) in enumerate(each):
            torch.addmm(given, states[t], from_memory, out=now).relu_()
            if factor is not None:
                now.mul_(factor)
            torch.addmm(retain_bias, first, retain, out=keep)
            torch.addmm(update_bias, second, update, out=write)
            pair.sigmoid_()
            torch.mul(keep, states[t], out=states[t + 1]).addcmul_(write, proposal)
        ctx.save_for_backward(proposals, from_memory, retain, update, kept, active, gates, memory)
        return memory[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        proposals, from_memory, retain, update, kept, active, gates, memory = ctx.saved_tensors
        width = proposals.shape[2]
        split, before = len(retain), memory[:-1]
        # Of the gates' inputs, per unit of the gradient of u_t; and of a_t before ReLU, per unit of that of a_t.
        slopes = torch.stack([before, proposals], 1).mul_(gates).mul_(1 - gates)
        open_units = (active > 0).to(active.dtype)
        if kept is not None:
            open_units.mul_(kept)
        of_gates, of_fixed = torch.empty_like(gates), torch.empty_like(active)
        of_flow = torch.empty_like(memory[1:])  # the gradient of every u_t, later steps included
        flow = torch.zeros_like(of_flow[0])
        into_retain, into_update, back = retain.mT, update.mT, from_memory.mT
        parts = of_fixed.split((split, of_fixed.shape[2] - split), 2)
        each = zip(
            *(x.unbind() for x in (grad, slopes, gates[:, 0], of_gates, of_gates[:, 0], of_gates[:, 1])),
            *(x.unbind() for x in (*parts, of_fixed, open_units, of_flow)),
            strict=True,
        )
        for given, slope, keep, pair, of_keep, of_write, first, second, now, units, whole in reversed(list(each)):
            torch.add(flow, given, out=whole)
            torch.mul(slope, whole, out=pair)
            torch.mm(of_keep, into_retain, out=first)
            torch.mm(of_write, into_update, out=second)
            torch.addmm(keep * whole, now.mul_(units), back, out=flow)
        flat = active.flatten(0, 1)
        of_retain, of_update = (of_gates[:, k].reshape(-1, width) for k in (0, 1))
        return (
            of_fixed,
            gates[:, 1] * of_flow,
            before.reshape(-1, width).mT @ of_fixed.flatten(0, 1),
            flat[:, :split].mT @ of_retain,
            of_retain.sum(0),
            flat[:, split:].mT @ of_update,
            of_update.sum(0),
            None,
        )


def gated_memory(
    fixed: Tensor,
    proposals: Tensor,
    from_memory: Tensor,
    retain: Tensor,
    retain_bias: Tensor,
    update: Tensor,
    update_bias: Tensor,
    kept: Tensor | None = None,
) -> Tensor:
    """``GatedMemory`` operation by operation, for any derivative."""
    split, memory, found = len(retain), torch.zeros_like(proposals[0]), []
    for t in range(len(proposals)):
        active = torch.addmm(fixed[t], memory, from_memory).relu()
        if kept is not None:
            active = active * kept[t]
        keep = torch.addmm(retain_bias, active[:, :split], retain).sigmoid()
        write = torch.addmm(update_bias, active[:, split:], update).sigmoid()
        memory = keep * memory + write * proposals[t]
        found.append(memory)
    return torch.stack(found)
