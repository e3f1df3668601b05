"""The contrastive losses with negatives from every rank.

Each rank holds B pairs and scores its own anchors against the candidates of all W ranks: B x WB scores per rank, never
stored. Features travel (O(W B D) bytes), scores do not. The value is the mean over this rank's anchors: its mean over
the ranks is the loss of one process that holds all W B pairs, and so is, after DistributedDataParallel's averaging,
every gradient, the temperature's included. That needs the gathered features to carry gradients back to their owner,
which `gather` does by summing over the ranks; libraries that stop that gradient train on another objective.

Every rank must call with the same shapes, dtypes and options, forward and backward. Without an initialised process
group these are the plain losses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .losses import common, supcon
from .ops.common.dtypes import accumulate_dtype
from .ops.dot_critic import api

__all__ = ["clip_loss", "gather", "info_nce", "nt_xent", "rank_and_size", "siglip_loss", "sup_con"]


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """This process's rank in the group and the number of ranks; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        shards = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, t, group=group)
        return torch.cat(shards)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _SumOwnShard.apply(g, ctx.group), None


class _SumOwnShard(torch.autograd.Function):
    """The transpose of gathering: sum over the ranks, then this rank's rows."""

    @staticmethod
    def forward(ctx, g: Tensor, group: Any) -> Tensor:
        ctx.group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        rows = g.shape[0] // size
        if dist.get_backend(group) == "nccl":
            own = g.new_empty(rows, *g.shape[1:])
            dist.reduce_scatter_tensor(own, g.contiguous(), group=group)
            return own
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total[rank * rows : (rank + 1) * rows].clone()

    @staticmethod
    def backward(ctx, g: Tensor):
        return _Gather.apply(g.contiguous(), ctx.group), None


def gather(t: Tensor, *, dim: int = 0, group: Any = None) -> Tensor:
    """The tensors of all ranks along `dim`, in the order of the ranks: [B, ...] -> [W B, ...].

    The gradient is summed over the ranks and returns to the owner; it may be differentiated again. All ranks need one
    shape and dtype. Moves (W - 1) shards each way.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if rank_and_size(group)[1] == 1:
        return t
    return _Gather.apply(t.movedim(dim, 0).contiguous(), group).movedim(0, dim)


def _own_columns(rows: int, rank: int, device: torch.device) -> Tensor:
    return torch.arange(rank * rows, (rank + 1) * rows, device=device)


def cross_entropy_rows(
    rows: Tensor,
    columns: Tensor,
    scale: float | Tensor,
    positive_shift: int,
    *,
    row_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    pairs: str = "all",
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean over the rows [*, B, D] of -log softmax at column (i + positive_shift) mod N. 3N FLOP, O((B + N) D)."""
    prepared = api.prepare(
        rows,
        columns,
        scale,
        row_bias=row_bias,
        row_ids=row_ids,
        col_ids=col_ids,
        pairs=pairs,
        positive_shift=positive_shift,
    )
    w = 1.0 / rows.shape[:-1].numel()
    return common.over_groups(api.loss(prepared, w_row=w, w_pos=w, normalize=normalize, backend=backend))


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.info_nce whose negatives are the keys of all ranks: query, positive_key [*, B, D] of this rank.

    Ids mean the same on every rank. 3 N W FLOP a rank, twice that symmetric (N = 2 B^2 D). Raises as mk.info_nce.
    """
    common.check_same_shape("query", query, "positive_key", positive_key)
    if query_ids is None and key_ids is not None:
        raise ValueError("key_ids was given without query_ids")
    scale = common.inverse_temperature(temperature)
    rank, _ = rank_and_size(group)
    shift = rank * query.shape[-2] if query.dim() > 1 else 0
    key_ids = query_ids if key_ids is None else key_ids

    def direction(rows: Tensor, columns: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> Tensor:
        return cross_entropy_rows(
            rows,
            gather(columns, dim=-2, group=group),
            scale,
            shift,
            row_ids=row_ids,
            col_ids=None if col_ids is None else gather(col_ids.expand(rows.shape[:-1]), dim=-1, group=group),
            pairs="all" if row_ids is None else "unequal_ids_or_positive",
            normalize=normalize,
            backend=backend,
        )

    loss = direction(query, positive_key, query_ids, key_ids)
    return (loss + direction(positive_key, query, key_ids, query_ids)) / 2 if symmetric else loss


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: Tensor | None = None,
    *,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.clip_loss over the pairs of all ranks. 6 N W FLOP a rank, O(W B D) memory."""
    common.check_same_shape("image_features", image_features, "text_features", text_features)
    bias = common.bias_rows(logit_bias, image_features)
    rank, _ = rank_and_size(group)
    shift = rank * image_features.shape[-2]
    texts, images = gather(text_features, dim=-2, group=group), gather(image_features, dim=-2, group=group)
    forth = cross_entropy_rows(image_features, texts, logit_scale, shift, row_bias=bias, backend=backend)
    back = cross_entropy_rows(text_features, images, logit_scale, shift, row_bias=bias, backend=backend)
    return (forth + back) / 2


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: Tensor | float | None,
    *,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.siglip_loss of this rank's images against the texts of all ranks, over B. 3 N W FLOP, O(W B D) memory."""
    common.check_same_shape("image_features", image_features, "text_features", text_features)
    bias = common.bias_rows(logit_bias, image_features)
    rank, _ = rank_and_size(group)
    rows = image_features.shape[:-1]
    prepared = api.prepare(
        image_features,
        gather(text_features, dim=-2, group=group),
        logit_scale,
        row_bias=bias,
        positive_shift=rank * rows[-1],
    )
    return common.over_groups(api.loss(prepared, w_soft=1.0 / rows.numel(), soft_signed=True, backend=backend))


def nt_xent(
    out0: Tensor, out1: Tensor, temperature: float | Tensor = 0.5, *, group: Any = None, backend: str | None = None
) -> Tensor:
    """mk.nt_xent over the 2 W B views of all ranks: this rank's 2 B views are its anchors. 12 N W FLOP a rank."""
    return nt_xent_scaled(out0, out1, common.inverse_temperature(temperature), group=group, backend=backend)


def nt_xent_scaled(
    out0: Tensor, out1: Tensor, scale: float | Tensor, *, group: Any = None, backend: str | None = None
) -> Tensor:
    """nt_xent whose scale, 1 / temperature, may have either sign."""
    rank, size = rank_and_size(group)
    if size == 1:
        return common.nt_xent_scaled(out0, out1, scale, backend)
    common.check_same_shape("out0", out0, "out1", out1)
    items = out0.shape[-2]
    own = _own_columns(items, rank, out0.device)
    all0, all1 = gather(out0, dim=-2, group=group), gather(out1, dim=-2, group=group)
    # The anchor itself is left out by its id; the other view's columns get ids that no row has.
    ids = torch.arange(size * items, device=out0.device)
    ids = torch.cat([ids, -1 - ids])
    total = out0.new_zeros((), dtype=accumulate_dtype(out0.dtype))
    for rows, same, other in ((out0, all0, all1), (out1, all1, all0)):
        total = total + cross_entropy_rows(
            rows,
            torch.cat([same, other], dim=-2),
            scale,
            (size + rank) * items,
            row_ids=own,
            col_ids=ids,
            pairs="unequal_ids_or_positive",
            normalize=True,
            backend=backend,
        )
    return total / 2


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float = 0.07,
    contrast_mode: str = "all",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.sup_con with the views and labels of all ranks: features [B, V, D], labels [B] of this rank.

    The mean counts the anchors of all ranks that have a positive.
    """
    rank, size = rank_and_size(group)
    settings = {"base_temperature": base_temperature, "contrast_mode": contrast_mode, "backend": backend}
    if size == 1:
        return supcon.sup_con(features, labels, temperature=temperature, **settings)  # type: ignore[arg-type]
    items = supcon.check_views(features, labels, base_temperature, contrast_mode)
    features = features.flatten(2)
    views = features.shape[1]
    every = gather(features, group=group)
    columns = _own_columns(items, rank, features.device)
    if labels is None:
        classes = torch.arange(size * items, device=features.device)
    else:
        mine = labels.reshape(-1).to(features.device)
        classes = torch.unique(gather(mine, group=group), return_inverse=True)[1]
    anchored = views if contrast_mode == "all" else 1
    rows, valid = supcon.class_rows(
        features[:, :anchored].transpose(0, 1).flatten(0, 1),
        every.transpose(0, 1).flatten(0, 1),
        classes[columns].repeat(anchored),
        classes.repeat(views),
        own=torch.cat([columns + v * size * items for v in range(anchored)]),
        scale=common.inverse_temperature(temperature),
        backend=backend,
    )
    number = valid.sum()
    dist.all_reduce(number, group=group)
    return temperature / base_temperature * rows.sum() * size / number.clamp(min=1)
