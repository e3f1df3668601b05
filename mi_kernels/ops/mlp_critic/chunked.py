"""Row chunks in plain torch: O(B) memory on any device, any depth, any activation of activations.py.

A tile is a range of groups times a range of rows against all N columns. Forward keeps the statistics alone;
`col_lse` is carried across row tiles by logaddexp. Backward recomputes the activations of a tile, forms

    dS[i, j] = [pair counts] (g_row_i exp(S - row_lse_i) + g_col_j exp(S - col_lse_j) + g_sum_i) + [i = j]
    g_pos_i

and walks the layers back. With M = 2 G B N sum_l H_l H_{l+1}: M FLOPs forward, 3 M backward (2 M when the
parameters need no gradient). Activations of one tile take at most `memory_budget` bytes, or one row's N sum_l
H_l when that is more; backward holds about two tiles. 16-bit inputs: layers in 16 bit, scores and all sums in
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .reference import statistics as reference_statistics
from .schema import BACKWARD, FORWARD, accumulator

Tile = tuple[slice, slice]


def activation_bytes(u: Tensor, v: Tensor, weights: Sequence[Tensor]) -> int:
    """Bytes of all hidden activations of all pairs."""
    return u.shape[0] * u.shape[1] * v.shape[1] * sum(w.shape[2] for w in weights) * u.element_size()


def _tiles(u: Tensor, v: Tensor, weights: Sequence[Tensor], memory_budget: int) -> Iterator[Tile]:
    groups, rows = u.shape[0], u.shape[1]
    per_row = max(1, activation_bytes(u, v, weights) // (groups * rows))
    fitting = max(1, memory_budget // per_row)
    if fitting >= rows:
        step = fitting // rows
        for start in range(0, groups, step):
            yield slice(start, min(start + step, groups)), slice(0, rows)
        return
    # Equal tiles: a short last one would run its matmuls at a worse rate.
    count = -(-rows // fitting)
    for group in range(groups):
        for k in range(count):
            yield slice(group, group + 1), slice(k * rows // count, (k + 1) * rows // count)


def _of_groups(tensors: Sequence[Tensor], groups: slice) -> list[Tensor]:
    return [t if t.shape[0] == 1 else t[groups] for t in tensors]


def _affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.shape[0] == 1:
        flat = torch.addmm(bias[0], h.flatten(0, 1), weight[0].T)
        return flat.unflatten(0, h.shape[:2])
    return torch.baddbmm(bias.unsqueeze(1), h, weight.mT)


def _tile_scores(
    u: Tensor, v: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Scores [g, R, N] of a tile and, if `keep`, what the backward needs of every hidden layer [g, R N,
    H]."""
    act = ACTIVATIONS[activation]
    kept = []
    h = (u.unsqueeze(2) + v.unsqueeze(1)).flatten(1, 2)
    for layer in range(len(weights)):
        if layer:
            h = _affine(h, weights[layer - 1], biases[layer - 1])
        z = h
        h = act.apply_(h)
        if keep:
            kept.append(h if act.keeps_output else z)
    dtype = accumulator(h.dtype)
    s = _affine(h.to(dtype), weights[-1].to(dtype), biases[-1].to(dtype))
    return s.view(u.shape[0], u.shape[1], v.shape[1]), kept


def _diagonal_mask(rows: slice, columns: int, device: torch.device) -> Tensor:
    index = torch.arange(rows.start, rows.stop, device=device)
    return index.unsqueeze(1) == torch.arange(columns, device=device)


@torch.library.impl(FORWARD, "CompositeExplicitAutograd")
def forward(
    u: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    off_diagonal: bool,
    row_lse: bool,
    col_lse: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics of schema.py; a log-sum that is not wanted comes back empty."""
    (groups, n_rows), n_columns = u.shape[:2], v.shape[1]
    square = n_rows == n_columns
    dtype = accumulator(u.dtype)
    positive = u.new_empty((groups, n_rows if square else 0), dtype=dtype)
    rows_out = u.new_empty((groups, n_rows if row_lse else 0), dtype=dtype)
    columns_out = u.new_full((groups, n_columns if col_lse else 0), -torch.inf, dtype=dtype)
    sums = u.new_empty((groups, n_rows), dtype=dtype)
    with torch.autocast(u.device.type, enabled=False):
        for g, r in _tiles(u, v, weights, memory_budget):
            s, _ = _tile_scores(
                u[g, r], v[g], _of_groups(weights, g), _of_groups(biases, g), activation, keep=False
            )
            if square:
                positive[g, r] = s.diagonal(r.start, dim1=1, dim2=2)
            if off_diagonal:
                mask = _diagonal_mask(r, n_columns, u.device)
                sums[g, r] = s.masked_fill(mask, 0).sum(2)
                s = s.masked_fill_(mask, -torch.inf)
            else:
                sums[g, r] = s.sum(2)
            if row_lse:
                rows_out[g, r] = s.logsumexp(2)
            if col_lse:
                columns_out[g] = torch.logaddexp(columns_out[g], s.logsumexp(1))
    return positive, rows_out, columns_out, sums


def _score_gradient(
    s: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: slice,
    off: bool,
) -> Tensor:
    """dS [g, R, N]; empty statistics contribute nothing."""
    g_positive, g_row, g_col, g_sum = grads
    ds = g_sum.unsqueeze(2).expand_as(s).clone()
    if row_lse.shape[1]:
        ds.addcmul_((s - row_lse.unsqueeze(2)).exp_(), g_row.unsqueeze(2))
    if col_lse.shape[1]:
        ds.addcmul_((s - col_lse.unsqueeze(1)).exp_(), g_col.unsqueeze(1))
    if off:
        # Set, not multiplied: over no pair the exponentials above are infinite.
        ds.masked_fill_(_diagonal_mask(rows, s.shape[2], s.device), 0)
    if g_positive.shape[1]:
        ds.diagonal(rows.start, dim1=1, dim2=2).add_(g_positive)
    return ds


def _weight_gradient(dz: Tensor, h: Tensor, shared: bool) -> Tensor:
    if shared:
        return (dz.flatten(0, 1).T @ h.flatten(0, 1)).unsqueeze(0)
    return dz.mT @ h


def _bias_gradient(dz: Tensor, shared: bool, dtype: torch.dtype) -> Tensor:
    return dz.sum((0, 1), dtype=dtype).unsqueeze(0) if shared else dz.sum(1, dtype=dtype)


def _input_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    if weight.shape[0] == 1:
        return (dz.flatten(0, 1) @ weight[0]).unflatten(0, dz.shape[:2])
    return dz @ weight


def _tile_backward(
    ds: Tensor,
    kept: list[Tensor],
    weights: list[Tensor],
    activation: str,
    d_weights: list[Tensor],
    d_biases: list[Tensor],
) -> Tensor:
    """Adds a tile's parameter gradients to the accumulators (none given, none wanted); returns dz_1 [g, R N,
    H_1]."""
    act = ACTIVATIONS[activation]
    dtype = weights[0].dtype
    scale = None
    if dtype == torch.float16:
        # dS shrinks as 1 / B^2 and would leave fp16's range; the tile runs at unit scale instead.
        scale = ds.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        ds = ds / scale
    dz = ds.flatten(1).unsqueeze(2)
    for layer in reversed(range(len(weights))):
        shared = weights[layer].shape[0] == 1
        factor = 1 if scale is None else scale
        if d_weights:
            h = kept[layer] if act.keeps_output else act.apply(kept[layer])
            if layer == len(weights) - 1:
                h = h.to(dz.dtype)
            d_weights[layer] += _weight_gradient(dz, h, shared).to(d_weights[layer].dtype) * factor
            d_biases[layer] += _bias_gradient(dz, shared, ds.dtype) * factor
        if layer == len(weights) - 1:
            dh = dz.to(dtype) * weights[layer]
        else:
            dh = _input_gradient(dz, weights[layer])
        dz = act.backward(dh, kept[layer])
    return dz if scale is None else dz.float().mul_(scale)


@torch.library.impl(BACKWARD, "CompositeExplicitAutograd")
def backward(
    u: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    row_lse: Tensor,
    col_lse: Tensor,
    grad_positive: Tensor,
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_row_sum: Tensor,
    activation: str,
    off_diagonal: bool,
    need_parameters: bool,
    memory_budget: int,
) -> list[Tensor]:
    """[du, dv], followed by the gradients of all weights and then all biases when they are needed."""
    dtype = accumulator(u.dtype)
    du = torch.empty(u.shape, dtype=dtype, device=u.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    d_weights = (
        [torch.zeros(w.shape, dtype=dtype, device=w.device) for w in weights] if need_parameters else []
    )
    d_biases = [torch.zeros(b.shape, dtype=dtype, device=b.device) for b in biases] if need_parameters else []
    with torch.autocast(u.device.type, enabled=False):
        for g, r in _tiles(u, v, weights, memory_budget):
            tile_weights = _of_groups(weights, g)
            s, kept = _tile_scores(u[g, r], v[g], tile_weights, _of_groups(biases, g), activation, keep=True)
            grads = (grad_positive[g, r], grad_row_lse[g, r], grad_col_lse[g], grad_row_sum[g, r])
            ds = _score_gradient(s, row_lse[g, r], col_lse[g], grads, r, off_diagonal)
            # Slices of the accumulators: `+=` on them writes through.
            dz = _tile_backward(
                ds, kept, tile_weights, activation, _of_groups(d_weights, g), _of_groups(d_biases, g)
            ).unflatten(1, s.shape[1:])
            du[g, r] = dz.sum(2, dtype=dtype)
            dv[g] += dz.sum(1, dtype=dtype)
    parameters = [*d_weights, *d_biases]
    inputs = [*weights, *biases][: len(parameters)]
    return [d.to(t.dtype) for d, t in zip((du, dv, *parameters), (u, v, *inputs), strict=True)]


def _differentiable_gradients(
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
    activation: str,
    off_diagonal: bool,
) -> list[Tensor | None]:
    """First-order gradients that can be differentiated again; materialises the scores."""
    n = (len(tensors) - 2) // 2
    # Aliases: a tensor that serves twice must not collect the sum of both gradients.
    u, v, *parameters = aliases = [t.view_as(t) for t in tensors]
    outputs = reference_statistics(u, v, parameters[:n], parameters[n:], activation, off_diagonal)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.shape == g.shape and o.numel()]
    targets = [a for a, need in zip(aliases, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used], targets, [g for _, g in used], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        off_diagonal: bool,
        row_lse: bool,
        col_lse: bool,
        memory_budget: int,
        n: int,
        u: Tensor,
        v: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, biases = list(parameters[:n]), list(parameters[n:])
        outputs = torch.ops.mi_kernels.mlp_critic_forward(
            u, v, weights, biases, activation, off_diagonal, row_lse, col_lse, memory_budget
        )
        ctx.save_for_backward(u, v, outputs[1], outputs[2], *parameters)
        ctx.n = n
        ctx.activation, ctx.off_diagonal, ctx.memory_budget = activation, off_diagonal, memory_budget
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, v, row_lse, col_lse, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[6:]
        none = (None,) * 6
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tensors = (u, v, *parameters)
            return *none, *_differentiable_gradients(tensors, needed, grads, ctx.activation, ctx.off_diagonal)
        weights, biases = parameters[: ctx.n], parameters[ctx.n :]
        need_parameters = any(needed[2:])
        g_positive, g_row, g_col, g_sum = grads
        found = torch.ops.mi_kernels.mlp_critic_backward(
            u,
            v,
            weights,
            biases,
            row_lse,
            col_lse,
            g_positive,
            g_row,
            g_col,
            g_sum,
            ctx.activation,
            ctx.off_diagonal,
            need_parameters,
            ctx.memory_budget,
        )
        if not need_parameters:
            return *none, found[0], found[1], *((None,) * len(parameters))
        return *none, *found


def statistics(
    u: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    off_diagonal: bool,
    *,
    row_lse: bool,
    col_lse: bool,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable statistics in row chunks; when everything fits one chunk and a gradient will be asked
    for, the activations of that chunk are kept by ordinary autograd, which saves the recompute (3 M FLOPs
    instead of 4 M).
    """
    tensors = (u, v, *weights, *biases)
    will_differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if will_differentiate and activation_bytes(u, v, weights) <= memory_budget:
        return reference_statistics(u, v, weights, biases, activation, off_diagonal)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Statistics.apply(
        activation, off_diagonal, row_lse, col_lse, memory_budget, len(weights), *tensors
    )
    return out
