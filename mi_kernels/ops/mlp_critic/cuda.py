"""The MLP critic on the CUDA C++ kernels of csrc/mlp_critic/ (sm_80 and higher): two hidden layers with ReLU or leaky
ReLU.

Forward costs M = 2 G B N H1 H2 FLOP and O((B + N) row blocks) floats of workspace. Backward costs 2 M if scores and
bits were saved; otherwise it repeats the forward pass in chunks of rows within `memory_budget` bytes and costs 3 M.
With P = sum_p m[p] (g_p h1_p)^T and s = sum_p g_p m[p] over pairs p, where m are the slopes of the second layer,

    dW2 = diag(w) P        db2 = w s        dw = rowsum(W2 * P) + b2 s        db = sum_p g_p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.precision import tf32_allowed
from .problem import Slopes

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOPES = {"relu": 0.0, "leaky_relu": 0.01}  # slope for negative inputs
_PART_BYTES = 256 << 20  # largest memory of partial sums, which torch adds up


@dataclass(frozen=True)
class _Critic:
    """A critic in the form of the kernels: w2 in the dtype of the products, the rest fp32, for one group or for all
    groups."""

    u: Tensor
    v: Tensor
    w2: Tensor
    b2: Tensor
    w: Tensor
    b: Tensor
    slope: float
    softplus: bool
    off_diagonal: bool
    tf32: bool

    def rows(self, g: slice, r: slice) -> _Critic:
        own = g if self.w2.shape[0] > 1 else slice(None)
        w2, b2, w, b = self.w2[own], self.b2[own], self.w[own], self.b[own]
        return replace(self, u=self.u[g, r].contiguous(), v=self.v[g], w2=w2, b2=b2, w=w, b=b)


def _critic(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    output: str,
    off_diagonal: bool,
) -> _Critic:
    """Converts a critic to the form of the kernels. Raises RuntimeError if the kernels do not support it."""
    for what, known in ((f"{len(weights)} hidden layer(s)", len(weights) == 2), (activation, activation in SLOPES)):
        if not known:
            raise RuntimeError(
                "backend 'cuda' was requested but only supports critics of two hidden layers with relu or leaky_relu, "
                f"got {what}"
            )
    dtype = weights[0].dtype
    if dtype not in TYPES:
        raise RuntimeError(f"backend 'cuda' was requested but cannot run mlp_critic: it has no kernel for {dtype}")
    groups = max(t.shape[0] for t in (*weights, *biases))
    w2, w = (t.expand(groups, *t.shape[1:]) for t in weights)
    b2, b = (t.expand(groups, *t.shape[1:]) for t in biases)
    b2, w, b = (t.float().reshape(groups, -1).contiguous() for t in (b2, w, b))
    tf32 = dtype == torch.float32 and tf32_allowed()
    head = (u.float().contiguous(), v.float().contiguous(), w2.contiguous(), b2, w, b)
    return _Critic(*head, SLOPES[activation], output == "softplus", off_diagonal, tf32)


def _run(k: _Critic, first_row: int, stats: int, clip: float, positive: bool, keep: bool) -> tuple[Tensor, ...]:
    head = (k.u, k.v, k.w2, k.b2, k.w, k.b, first_row, k.softplus, k.off_diagonal, k.slope)
    return torch.ops.mi_kernels_cuda.mlp_critic_forward(*head, stats, clip, positive, keep, k.tf32)


def forward(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    output: str,
    off_diagonal: bool,
    stats: int,
    clip: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The six statistics of schema.py and the tensors saved for backward. M FLOP."""
    k = _critic(u, v, weights, biases, activation, output, off_diagonal)
    return _run(k, 0, stats, clip, u.shape[1] == v.shape[1], keep)


def _chunks(k: _Critic, budget: int) -> Iterator[tuple[slice, slice]]:
    """Yields groups and rows whose scores, score gradients and bits fit `budget`; at least 16 rows."""
    groups, rows, columns = k.u.shape[0], k.u.shape[1], k.v.shape[1]
    row_bytes = columns * (8 + 4 * -(-k.w2.shape[1] // 32))
    if row_bytes * rows <= budget:
        step = budget // (row_bytes * rows)
        for g in range(0, groups, step):
            yield slice(g, min(g + step, groups)), slice(0, rows)
        return
    step = max(16, budget // row_bytes // 16 * 16)
    for g in range(groups):
        for r in range(0, rows, step):
            yield slice(g, g + 1), slice(r, min(r + step, rows))


def _unit_scale(t: Tensor) -> Tensor:
    """A power of two near the largest magnitude in t, [1]. Dividing by it preserves the precision of fp16 values."""
    largest = t.abs().amax()
    return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest))), 1.0).reshape(1)


class _Totals:
    """Gradients summed over chunks, in fp32."""

    def __init__(self, k: _Critic, need_parameters: bool):
        self.k = k
        zeros = lambda t: torch.zeros(t.shape, dtype=torch.float32, device=t.device)  # noqa: E731
        self.u, self.v = torch.empty(k.u.shape, dtype=torch.float32, device=k.u.device), zeros(k.v)
        self.product, self.sums, self.b = (zeros(t) if need_parameters else None for t in (k.w2, k.b2, k.b))
        folded = k.w2.float() * k.w[:, :, None]
        self.scale = _unit_scale(folded) if k.w2.dtype == torch.float16 else None
        self.folded = (folded if self.scale is None else folded / self.scale).to(k.w2.dtype).contiguous()

    def _add(self, total: Tensor, part: Tensor, g: slice) -> None:
        if self.k.w2.shape[0] > 1:
            total[g] += part
        else:
            total += part.sum(0, keepdim=True)

    def add(self, g: slice, r: slice, ds: Tensor, bits: Tensor) -> None:
        cuda, k = torch.ops.mi_kernels_cuda, self.k.rows(g, r)
        folded = self.folded if self.folded.shape[0] == 1 else self.folded[g]
        du, dv = cuda.mlp_critic_input_gradient(k.u, k.v, folded, ds, bits, k.slope, _PART_BYTES, k.tf32)
        dv = dv.sum(0)
        self.u[g, r] = du if self.scale is None else du * self.scale
        self.v[g] += dv if self.scale is None else dv * self.scale
        if self.product is None or self.sums is None or self.b is None:
            return
        gain = _unit_scale(ds) if k.w2.dtype == torch.float16 else None
        found = cuda.mlp_critic_weight_gradient(k.u, k.v, k.w2, ds, bits, gain, k.slope, _PART_BYTES, k.tf32)
        product, sums = (t.sum(0) if gain is None else t.sum(0) * gain for t in found)
        self._add(self.product, product, g)
        self._add(self.sums, sums, g)
        self._add(self.b, ds.sum((1, 2)).unsqueeze(1), g)

    def parameters(self) -> list[Tensor]:
        """dW2, dw, db2, db."""
        if self.product is None or self.sums is None or self.b is None:
            return []
        k = self.k
        dw = (k.w2.float() * self.product).sum(2) + k.b2 * self.sums
        return [k.w[:, :, None] * self.product, dw.unsqueeze(1), k.w * self.sums, self.b]


def backward(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    output: str,
    off_diagonal: bool,
    row_lse: Tensor,
    col_lse: Tensor,
    slopes: Slopes,
    kept_scores: Tensor,
    kept_bits: Tensor,
    need_parameters: bool,
    memory_budget: int,
) -> list[Tensor]:
    """[du, dv], followed by the gradients of all weights and then all biases when they are needed."""
    k = _critic(u, v, weights, biases, activation, output, off_diagonal)
    kept = kept_scores.dim() == 3
    slopes = Slopes(*(None if t is None else t.float().contiguous() for t in slopes))
    of = lambda t, g, side: None if t is None else t[g, side].contiguous()  # noqa: E731
    total = _Totals(k, need_parameters)
    everything = [(slice(0, u.shape[0]), slice(0, u.shape[1]))]
    for g, r in everything if kept else _chunks(k, memory_budget):
        scores, bits = kept_scores, kept_bits
        if not kept:
            *_, scores, bits = _run(k.rows(g, r), r.start, 0, 0.0, False, True)
        columns = slice(None)
        ds = torch.ops.mi_kernels_cuda.mlp_critic_score_gradient(
            scores,
            of(row_lse if slopes.row_lse is not None else None, g, r),
            of(col_lse if slopes.col_lse is not None else None, g, columns),
            of(slopes.positive, g, r),
            of(slopes.row_lse, g, r),
            of(slopes.col_lse, g, columns),
            of(slopes.row_sum, g, r),
            of(slopes.row_softplus, g, r),
            r.start,
            k.softplus,
            off_diagonal,
        )
        total.add(g, r, ds, bits)
    inputs = (u, v, *weights, *biases)
    found = [total.u, total.v, *total.parameters()]
    # Parameters that groups share beside others that they do not were spread over the groups.
    found = [d if d.shape == t.shape else d.sum(0, keepdim=True) for d, t in zip(found, inputs, strict=False)]
    return [d.to(t.dtype) for d, t in zip(found, inputs, strict=False)]
