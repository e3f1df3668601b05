"""The losses: one value, by gathering the features of all ranks or by passing them around a ring."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..losses import common, supcon
from ..ops.common.dtypes import accumulate_dtype
from ..ops.dot_critic import api
from . import ring
from .exchange import Ranks, gather_rows, meet, rank_and_size


def _met(features: Tensor, name: str, schedule: str, group: Any, dim: int = -2) -> Ranks:
    """The rows of every rank, after the checks that need no exchange."""
    if schedule not in ("gather", "ring"):
        raise ValueError(f"schedule must be 'gather' or 'ring', got {schedule!r}")
    if features.dim() < 2:
        raise ValueError(f"{name} must have shape [*, batch, features], got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {features.dtype}")
    return meet(features, dim=dim, group=group, name=name)


def _idle(*gathered: Tensor) -> Tensor:
    """0 for a rank without rows. It keeps the graph: this rank must take part in the collectives of the backward."""
    return torch.stack([t.narrow(0, 0, 0).sum().to(accumulate_dtype(t.dtype)) for t in gathered]).sum()


def _pair_scores(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """scale <x_i, y_i>, [*, B]."""
    wide = accumulate_dtype(x.dtype)
    factor = scale[..., None] if isinstance(scale, Tensor) and scale.dim() else scale
    return (x.to(wide) * y.to(wide)).sum(-1) * factor


def _mean(rows: Tensor, ranks: Ranks) -> Tensor:
    """The sum of losses [*, B], weighted so that its mean over the ranks is the mean over the rows of all ranks."""
    return rows.sum() * (ranks.weight / max(1, rows.shape[:-1].numel()))


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
    weight: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """weight (default: 1 / B) times the sum over the rows [*, B, D] of -log softmax at column (i + positive_shift) mod
    N, averaged over the groups. 3N FLOP, O((B + N) D)."""
    if not rows.shape[-2]:
        return _idle(rows, columns)
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
    w = (1.0 / rows.shape[-2] if weight is None else weight) / rows.shape[:-2].numel()
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
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.info_nce whose negatives are the keys of all ranks: query, positive_key [*, B, D] of this rank.

    Ids [*, B] mean the same on every rank. A rank's FLOP, N = 2 B^2 D: 3 N W, twice that symmetric; as a ring 4 N W
    both ways. Raises as mk.info_nce.
    """
    common.check_same_shape("query", query, "positive_key", positive_key)
    if query_ids is None and key_ids is not None:
        raise ValueError("key_ids was given without query_ids")
    scale = common.inverse_temperature(temperature)
    ranks = _met(query, "query", schedule, group)
    key_ids = query_ids if key_ids is None else key_ids
    if schedule == "ring" and len(ranks.sizes) > 1:
        if normalize:
            wide = accumulate_dtype(query.dtype)
            query, positive_key = (F.normalize(t.to(wide), dim=-1) for t in (query, positive_key))
        stats = ring.ROW_LSE | (ring.COL_LSE if symmetric else 0)
        columns = ring.Columns(ranks, group, stats, False, backend or "")
        found = ring.statistics(query, positive_key, scale, columns, row_ids=query_ids, col_ids=key_ids)
        lse = found.row_lse if found.col_lse is None else (found.row_lse + found.col_lse) / 2
        return _mean(lse - _pair_scores(query, positive_key, scale), ranks)

    def direction(rows: Tensor, columns: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> Tensor:
        return cross_entropy_rows(
            rows,
            gather_rows(columns, ranks, dim=-2, group=group),
            scale,
            ranks.first,
            row_ids=row_ids,
            col_ids=None if col_ids is None else gather_rows(col_ids.expand(rows.shape[:-1]), ranks, dim=-1, group=group),
            pairs="all" if row_ids is None else "unequal_ids_or_positive",
            normalize=normalize,
            weight=ranks.weight,
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
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.clip_loss over the pairs of all ranks. 6 N W FLOP a rank and O(W B D) memory; as a ring 4 N W and O(B D)."""
    common.check_same_shape("image_features", image_features, "text_features", text_features)
    bias = common.bias_rows(logit_bias, image_features)
    ranks = _met(image_features, "image_features", schedule, group)
    if schedule == "ring" and len(ranks.sizes) > 1:
        columns = ring.Columns(ranks, group, ring.ROW_LSE | ring.COL_LSE, False, backend or "")
        found = ring.statistics(image_features, text_features, logit_scale, columns)
        assert found.row_lse is not None and found.col_lse is not None
        pairs = _pair_scores(image_features, text_features, logit_scale)
        rows = (found.row_lse + found.col_lse) / 2 - pairs
        return _mean(rows if bias is None else rows + 0 * bias, ranks)
    texts, images = (gather_rows(t, ranks, dim=-2, group=group) for t in (text_features, image_features))
    settings = {"row_bias": bias, "weight": ranks.weight, "backend": backend}
    forth = cross_entropy_rows(image_features, texts, logit_scale, ranks.first, **settings)  # type: ignore[arg-type]
    back = cross_entropy_rows(text_features, images, logit_scale, ranks.first, **settings)  # type: ignore[arg-type]
    return (forth + back) / 2


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: Tensor | float | None,
    *,
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.siglip_loss of this rank's images against the texts of all ranks, over B. 3 N W FLOP and O(W B D) memory; as a
    ring 4 N W and O(B D)."""
    common.check_same_shape("image_features", image_features, "text_features", text_features)
    bias = common.bias_rows(logit_bias, image_features)
    ranks = _met(image_features, "image_features", schedule, group)
    if schedule == "ring" and len(ranks.sizes) > 1:
        columns = ring.Columns(ranks, group, ring.SOFTPLUS, False, backend or "")
        found = ring.statistics(image_features, text_features, logit_scale, columns, row_bias=bias)
        assert found.row_softplus is not None
        return _mean(found.row_softplus, ranks)
    texts = gather_rows(text_features, ranks, dim=-2, group=group)
    if not image_features.shape[-2]:
        return _idle(image_features, texts)
    prepared = api.prepare(image_features, texts, logit_scale, row_bias=bias, positive_shift=ranks.first)
    w = ranks.weight / image_features.shape[:-2].numel()
    return common.over_groups(api.loss(prepared, w_soft=w, soft_signed=True, backend=backend))


def nt_xent(
    out0: Tensor,
    out1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.nt_xent over the views of all ranks: this rank's 2 B views are its anchors. 12 N W FLOP a rank; as a ring
    16 N W."""
    scale = common.inverse_temperature(temperature)
    return nt_xent_scaled(out0, out1, scale, schedule=schedule, group=group, backend=backend)


def nt_xent_scaled(
    out0: Tensor,
    out1: Tensor,
    scale: float | Tensor,
    *,
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """nt_xent whose scale, 1 / temperature, may have either sign."""
    common.check_same_shape("out0", out0, "out1", out1)
    ranks = _met(out0, "out0", schedule, group)
    if len(ranks.sizes) == 1:
        return common.nt_xent_scaled(out0, out1, scale, backend)
    if schedule == "ring":
        wide = accumulate_dtype(out0.dtype)
        views = F.normalize(torch.cat([out0, out1], dim=-2).to(wide), dim=-1)
        both = Ranks(ranks.rank, tuple(2 * n for n in ranks.sizes))
        found = ring.statistics(views, views, scale, ring.Columns(both, group, ring.ROW_LSE, True, backend or ""))
        assert found.row_lse is not None
        pairs = _pair_scores(*views.split(out0.shape[-2], dim=-2), scale)
        return _mean(found.row_lse - torch.cat([pairs, pairs], dim=-1), both)
    all0, all1 = (gather_rows(t, ranks, dim=-2, group=group) for t in (out0, out1))
    # The anchor itself is left out by its id; the other view's columns get ids that no row has.
    ids = torch.arange(ranks.total, device=out0.device)
    own = ids[ranks.first : ranks.first + out0.shape[-2]]
    total = out0.new_zeros((), dtype=accumulate_dtype(out0.dtype))
    for rows, same, other in ((out0, all0, all1), (out1, all1, all0)):
        total = total + cross_entropy_rows(
            rows,
            torch.cat([same, other], dim=-2),
            scale,
            ranks.total + ranks.first,
            row_ids=own,
            col_ids=torch.cat([ids, -1 - ids]),
            pairs="unequal_ids_or_positive",
            normalize=True,
            weight=ranks.weight,
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
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """mk.sup_con with the views and labels of all ranks: features [B, V, D], labels [B] of this rank.

    The mean counts the anchors of all ranks that have a positive.
    """
    size = rank_and_size(group)[1]
    settings = {"base_temperature": base_temperature, "contrast_mode": contrast_mode, "backend": backend}
    if size == 1:
        return supcon.sup_con(features, labels, temperature=temperature, **settings)  # type: ignore[arg-type]
    items = features.shape[0] if isinstance(features, Tensor) and features.dim() else 0
    if items:
        supcon.check_views(features, labels, base_temperature, contrast_mode)
    ranks = _met(features, "features", schedule, group, dim=0)
    features = features.flatten(2)
    views = features.shape[1]
    if labels is None:
        mine = torch.arange(ranks.first, ranks.first + items, device=features.device)
    else:
        mine = labels.reshape(-1).to(features.device)
    anchored = views if contrast_mode == "all" else 1
    scale = common.inverse_temperature(temperature)
    if schedule == "ring":
        columns = ring.Columns(Ranks(ranks.rank, tuple(n * views for n in ranks.sizes)), group, ring.ROW_LSE, True, "")
        rows, valid = _sup_con_ring(features, mine, anchored, scale, columns._replace(backend=backend or ""))
    else:
        every = gather_rows(features, ranks, group=group)
        classes = torch.unique(gather_rows(mine, ranks, group=group), return_inverse=True)[1]
        own = torch.arange(ranks.first, ranks.first + items, device=features.device)
        if items:
            rows, valid = supcon.class_rows(
                features[:, :anchored].transpose(0, 1).flatten(0, 1),
                every.transpose(0, 1).flatten(0, 1),
                classes[own].repeat(anchored),
                classes.repeat(views),
                own=torch.cat([own + v * ranks.total for v in range(anchored)]),
                scale=scale,
                backend=backend,
            )
        else:
            rows, valid = _idle(features, every), own
    number = valid.sum()
    dist.all_reduce(number, group=group)
    return temperature / base_temperature * rows.sum() * size / number.clamp(min=1)


def _sup_con_ring(
    features: Tensor, labels: Tensor, anchored: int, scale: float | Tensor, columns: ring.Columns
) -> tuple[Tensor, Tensor]:
    """Losses of the anchors [anchored B] and which of them have a positive: features [B, V, D], labels [B]."""
    items, views = features.shape[:2]
    contrast = features.to(accumulate_dtype(features.dtype)).transpose(0, 1).flatten(0, 1)
    anchors = contrast[: anchored * items]
    classes, own = torch.unique(labels, return_inverse=True)
    found = ring.statistics(anchors, contrast, scale, columns, col_ids=labels.repeat(views), classes=classes)
    assert found.row_lse is not None and found.class_sums is not None and found.class_counts is not None
    own = own.repeat(anchored)
    towards, number = found.class_sums[own] - anchors, found.class_counts[own] - 1
    valid = number > 0
    positive = (anchors * towards).sum(-1) * scale / number.clamp(min=1)
    return torch.where(valid, found.row_lse - positive, 0), valid
