"""The distributed losses of pairs, with the schedules "gather" and "ring"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import common
from ..ops.common.checks import backend_name, check_bool
from ..ops.common.dtypes import accumulate_dtype
from ..ops.common.precision import joined
from ..ops.common.rows import unit_rows, widened
from ..ops.dot_critic import api
from . import ring
from .common import check_pair, idle, mean_over_ranks, met, pair_scores
from .exchange import Ranks, gather_rows


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
    """weight (default 1 / B) times the sum over rows [*, B, D] of -log softmax at column (i + positive_shift) mod N,
    averaged over the groups. 3N FLOP, O((B + N) D) memory."""
    check_bool(normalize=normalize)
    if not rows.shape[-2]:
        return idle(rows, columns, scale, row_bias)
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
    """`mk.info_nce` with the keys of all ranks as negatives. query, positive_key [*, B, D] are the pairs of this rank.

    The arguments are those of `mk.info_nce`; ids [*, B] must have the same meaning on every rank. schedule is "gather"
    or "ring", group a torch process group. FLOP per rank, with N = 2 B^2 D: 3 N W, or 6 N W if symmetric; with the ring
    4 N W in both cases. Raises the errors of `mk.info_nce`.
    """
    check_pair("query", query, "positive_key", positive_key)
    check_bool(normalize=normalize, symmetric=symmetric)
    if query_ids is None and key_ids is not None:
        raise ValueError("key_ids was given without query_ids")
    scale = common.inverse_temperature(temperature, query.shape[:-2], query.dtype)
    ranks = met(query, "query", schedule, group)
    key_ids = query_ids if key_ids is None else key_ids
    if schedule == "ring" and len(ranks.sizes) > 1:
        dtype, prepared = query.dtype, unit_rows if normalize else widened
        query, positive_key = prepared(query), prepared(positive_key)
        stats = ring.ROW_LSE | (ring.COL_LSE if symmetric else 0)
        columns = ring.Columns(ranks, group, stats, False, backend_name(backend), dtype)
        found = ring.statistics(query, positive_key, scale, columns, row_ids=query_ids, col_ids=key_ids)
        assert found.row_lse is not None
        lse = found.row_lse if found.col_lse is None else (found.row_lse + found.col_lse) / 2
        return mean_over_ranks(lse - pair_scores(query, positive_key, scale), ranks)

    def direction(rows: Tensor, columns: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> Tensor:
        if col_ids is not None:
            col_ids = gather_rows(col_ids.long().expand(rows.shape[:-1]), ranks, dim=-1, group=group)
        return cross_entropy_rows(
            rows,
            gather_rows(columns, ranks, dim=-2, group=group),
            scale,
            ranks.first,
            row_ids=row_ids,
            col_ids=col_ids,
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
    """`mk.clip_loss` over the pairs of all ranks. "gather": 6 N W FLOP per rank and O(W B D) memory; "ring": 4 N W FLOP
    and O(B D) memory."""
    check_pair("image_features", image_features, "text_features", text_features)
    bias = common.bias_rows(logit_bias, image_features)
    ranks = met(image_features, "image_features", schedule, group)
    if schedule == "ring" and len(ranks.sizes) > 1:
        columns = ring.Columns(
            ranks, group, ring.ROW_LSE | ring.COL_LSE, False, backend_name(backend), text_features.dtype
        )
        image_features, text_features = widened(image_features), widened(text_features)
        found = ring.statistics(image_features, text_features, logit_scale, columns)
        assert found.row_lse is not None and found.col_lse is not None
        pairs = pair_scores(image_features, text_features, logit_scale)
        rows = (found.row_lse + found.col_lse) / 2 - pairs
        return mean_over_ranks(rows if bias is None else rows + 0 * bias, ranks)
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
    """`mk.siglip_loss` of this rank's images against the texts of all ranks, divided by B. "gather": 3 N W FLOP per
    rank and O(W B D) memory; "ring": 4 N W FLOP and O(B D) memory."""
    check_pair("image_features", image_features, "text_features", text_features)
    bias = common.bias_rows(logit_bias, image_features)
    ranks = met(image_features, "image_features", schedule, group)
    if schedule == "ring" and len(ranks.sizes) > 1:
        columns = ring.Columns(ranks, group, ring.SOFTPLUS, False, backend_name(backend), text_features.dtype)
        images, texts = widened(image_features), widened(text_features)
        found = ring.statistics(images, texts, logit_scale, columns, row_bias=bias)
        assert found.row_softplus is not None
        return mean_over_ranks(found.row_softplus, ranks)
    texts = gather_rows(text_features, ranks, dim=-2, group=group)
    if not image_features.shape[-2]:
        return idle(image_features, texts, logit_scale, bias)
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
    """`mk.nt_xent` over the views of all ranks; the 2 B views of this rank are its anchors. "gather": 12 N W FLOP per
    rank; "ring": 16 N W FLOP."""
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
    """nt_xent with a scale (1 / temperature) of either sign."""
    check_pair("out0", out0, "out1", out1)
    ranks = met(out0, "out0", schedule, group)
    if len(ranks.sizes) == 1:
        return common.nt_xent_scaled(out0, out1, scale, backend)
    if schedule == "ring":
        views = unit_rows(joined([out0, out1], dim=-2))
        both = Ranks(ranks.rank, tuple(2 * n for n in ranks.sizes))
        columns = ring.Columns(both, group, ring.ROW_LSE, True, backend_name(backend), out0.dtype)
        found = ring.statistics(views, views, scale, columns)
        assert found.row_lse is not None
        items = out0.shape[-2]
        pairs = pair_scores(views[..., :items, :], views[..., items:, :], scale)
        return mean_over_ranks(found.row_lse - torch.cat([pairs, pairs], dim=-1), both)
    all0, all1 = (gather_rows(t, ranks, dim=-2, group=group) for t in (out0, out1))
    # Equal ids exclude the anchor itself; the columns of the other view get ids that no row has.
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
