"""The MLP critic in chunks of rows in plain torch: O(B) memory on any device, with any depth and activation.

A tile is a range of groups and a range of rows against all N columns. Forward keeps only the statistics and combines
`col_lse` of the row tiles by logaddexp. Backward recomputes the activations of a tile, computes

    dS[i, j] = [pair counts] (g_row_i exp(S - row_lse_i) + g_col_j exp(S - col_lse_j) + g_sum_i + g_soft_i sigmoid S)
               + [i = j] g_pos_i

and backpropagates it through the layers. With M = 2 G B N sum_l H_l H_{l+1}: M FLOP forward, 3 M backward (2 M if the
parameters need no gradient). The activations of one tile take at most `memory_budget` bytes, or those of one row (N
sum_l H_l numbers) if that is more; backward holds about two tiles. For 16-bit inputs layers run in 16 bits, and scores
and all sums are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.precision import outside_autocast
from .activations import ACTIVATIONS
from .problem import Critic, LogSums, Request, Score, Slopes
from .reference import softplus
from .schema import CLIPPED_ROW_LSE, COL_LSE, ROW_LSE, ROW_SOFTPLUS

Tile = tuple[slice, slice]


def activation_bytes(u: Tensor, v: Tensor, weights: Sequence[Tensor]) -> int:
    """Bytes of all hidden activations of all pairs."""
    return u.shape[0] * u.shape[1] * v.shape[1] * sum(w.shape[2] for w in weights) * weights[0].element_size()


def fits(critic: Critic, memory_budget: int) -> bool:
    """Whether a gradient is wanted and the activations of all pairs fit: ordinary autograd then keeps them, which saves
    the recompute (3 M FLOPs instead of 4 M)."""
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in critic.tensors)
    return differentiated and activation_bytes(critic.u, critic.v, critic.weights) <= memory_budget


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
    """Scores [g, R, N] of a tile and, if `keep`, the tensors of every hidden layer that backward needs, [g, R N, H]."""
    act = ACTIVATIONS[activation]
    kept = []
    h = (u.unsqueeze(2) + v.unsqueeze(1)).flatten(1, 2).to(weights[0].dtype)
    for layer in range(len(weights)):
        if layer:
            h = _affine(h, weights[layer - 1], biases[layer - 1])
        z = h
        h = act.apply_(h)
        if keep:
            kept.append(h if act.keeps_output else z)
    dtype = accumulate_dtype(h.dtype)
    s = _affine(h.to(dtype), weights[-1].to(dtype), biases[-1].to(dtype))
    return s.view(u.shape[0], u.shape[1], v.shape[1]), kept


def _diagonal_mask(rows: slice, columns: int, device: torch.device) -> Tensor:
    index = torch.arange(rows.start, rows.stop, device=device)
    return index.unsqueeze(1) == torch.arange(columns, device=device)


@outside_autocast
def forward(critic: Critic, score: Score, request: Request, memory_budget: int) -> tuple[Tensor, ...]:
    """The six statistics of schema.py; those that are not requested are empty."""
    u, v, weights, biases = critic
    stats, clip, _ = request
    (groups, n_rows), n_columns = u.shape[:2], v.shape[1]
    square = n_rows == n_columns
    dtype = accumulate_dtype(u.dtype)
    rows = lambda wanted: u.new_empty((groups, n_rows if wanted else 0), dtype=dtype)  # noqa: E731
    positive, row_lse, sums = rows(square), rows(stats & ROW_LSE), rows(True)
    soft, clipped = rows(stats & ROW_SOFTPLUS), rows(stats & CLIPPED_ROW_LSE)
    col_lse = u.new_full((groups, n_columns if stats & COL_LSE else 0), -torch.inf, dtype=dtype)
    for g, r in _tiles(u, v, weights, memory_budget):
        own = (_of_groups(weights, g), _of_groups(biases, g))
        s, _ = _tile_scores(u[g, r], v[g], *own, score.activation, keep=False)
        if score.output == "softplus":
            s = softplus(s)
        if square:
            positive[g, r] = s.diagonal(r.start, dim1=1, dim2=2)
        mask = _diagonal_mask(r, n_columns, u.device) if score.off_diagonal else None
        counted = lambda t, fill, m=mask: t if m is None else t.masked_fill(m, fill)  # noqa: E731
        sums[g, r] = counted(s, 0).sum(2)
        if stats & ROW_SOFTPLUS:
            soft[g, r] = counted(softplus(s), 0).sum(2)
        if stats & CLIPPED_ROW_LSE:
            clipped[g, r] = counted(s.clamp(-clip, clip), -torch.inf).logsumexp(2)
        s = counted(s, -torch.inf)
        if stats & ROW_LSE:
            row_lse[g, r] = s.logsumexp(2)
        if stats & COL_LSE:
            col_lse[g] = torch.logaddexp(col_lse[g], s.logsumexp(1))
    return positive, row_lse, col_lse, sums, soft, clipped


def _score_gradient(
    raw: Tensor, score: Score, row_lse: Tensor | None, col_lse: Tensor | None, slopes: Slopes, rows: slice
) -> Tensor:
    """dS [g, R, N] with respect to the scores before the output activation."""
    s = softplus(raw) if score.output == "softplus" else raw
    ds = torch.zeros_like(s) if slopes.row_sum is None else slopes.row_sum.unsqueeze(2).expand_as(s).clone()
    if slopes.row_lse is not None and row_lse is not None:
        ds.addcmul_((s - row_lse.unsqueeze(2)).exp_(), slopes.row_lse.unsqueeze(2))
    if slopes.col_lse is not None and col_lse is not None:
        ds.addcmul_((s - col_lse.unsqueeze(1)).exp_(), slopes.col_lse.unsqueeze(1))
    if slopes.row_softplus is not None:
        ds.addcmul_(s.sigmoid(), slopes.row_softplus.unsqueeze(2))
    if score.off_diagonal:
        # Set instead of multiplied, because the exponentials above are infinite for a row without pairs.
        ds.masked_fill_(_diagonal_mask(rows, s.shape[2], s.device), 0)
    if slopes.positive is not None:
        ds.diagonal(rows.start, dim1=1, dim2=2).add_(slopes.positive)
    return ds.mul_(raw.sigmoid()) if score.output == "softplus" else ds


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
    """Adds a tile's parameter gradients to the accumulators, if there are any; returns dz_1 [g, R N, H_1]."""
    act = ACTIVATIONS[activation]
    dtype = weights[0].dtype
    scale = None
    if dtype == torch.float16:
        # dS decreases as 1 / B^2 and would underflow in fp16, so the tile is scaled to unit size.
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


@outside_autocast
def backward(
    critic: Critic, score: Score, sums: LogSums, slopes: Slopes, need_parameters: bool, memory_budget: int
) -> list[Tensor]:
    """[du, dv], followed by the gradients of all weights and then all biases when they are needed."""
    u, v, weights, biases = critic
    dtype = accumulate_dtype(u.dtype)
    du = torch.empty(u.shape, dtype=dtype, device=u.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    zeros = lambda t: torch.zeros(t.shape, dtype=dtype, device=t.device)  # noqa: E731
    d_weights = [zeros(w) for w in weights] if need_parameters else []
    d_biases = [zeros(b) for b in biases] if need_parameters else []
    of = lambda t, g, side: None if t is None else t[g, side]  # noqa: E731
    columns = slice(None)
    for g, r in _tiles(u, v, weights, memory_budget):
        own = (_of_groups(weights, g), _of_groups(biases, g))
        s, kept = _tile_scores(u[g, r], v[g], *own, score.activation, keep=True)
        sides = (r, r, columns, r, r)
        of_tile = Slopes(*(of(t, g, side) for t, side in zip(slopes, sides, strict=True)))
        ds = _score_gradient(s, score, of(sums.row_lse, g, r), of(sums.col_lse, g, columns), of_tile, r)
        # Slices of the accumulators, so `+=` changes the accumulators.
        totals = (_of_groups(d_weights, g), _of_groups(d_biases, g))
        dz = _tile_backward(ds, kept, own[0], score.activation, *totals).unflatten(1, s.shape[1:])
        du[g, r] = dz.sum(2, dtype=dtype)
        dv[g] += dz.sum(1, dtype=dtype)
    found = (du, dv, *d_weights, *d_biases)
    return [d.to(t.dtype) for d, t in zip(found, critic.tensors, strict=False)]
