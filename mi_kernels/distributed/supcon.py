"""The supervised contrastive loss over the views of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import common, supcon
from ..ops.common.checks import backend_name
from ..ops.common.rows import widened
from . import ring
from .common import idle, met
from .exchange import Ranks, gather_rows, rank_and_size


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float = 0.07,
    contrast_mode: str = "all",
    schedule: str = "gather",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """`mk.sup_con` with the views and labels of all ranks. features [B, V, D] and labels [B] are those of this rank.

    The arguments are those of `mk.sup_con`, except that mask is [B, N]: the weights of the N items of all ranks, in the
    order of the ranks, as positives of this rank's items. Either all ranks give a mask or none does; it needs
    schedule="gather". The mean is over the anchors of all ranks that have a positive.
    """
    if mask is not None and labels is not None:
        raise ValueError("labels and mask cannot both be given: both say which items are positives")
    if mask is not None and schedule == "ring":
        raise ValueError('mask needs schedule="gather", got "ring"')
    size = rank_and_size(group)[1]
    settings = {"base_temperature": base_temperature, "contrast_mode": contrast_mode, "backend": backend}
    if size == 1:
        return supcon.sup_con(features, labels, mask=mask, temperature=temperature, **settings)  # type: ignore[arg-type]
    items = features.shape[0] if isinstance(features, Tensor) and features.dim() else 0
    if items:
        supcon.check_views(features, labels, base_temperature, contrast_mode)
    ranks = met(features, "features", schedule, group, dim=0)
    features = features.flatten(2)
    views = features.shape[1]
    if labels is None:
        mine = torch.arange(ranks.first, ranks.first + items, device=features.device)
    else:
        # the same dtype on every rank
        mine = labels.reshape(-1).to(features.device, torch.float64 if labels.is_floating_point() else torch.long)
    anchored = views if contrast_mode == "all" else 1
    scale = common.inverse_temperature(temperature)
    if schedule == "ring":
        every_view = Ranks(ranks.rank, tuple(n * views for n in ranks.sizes))
        columns = ring.Columns(every_view, group, ring.ROW_LSE, True, backend_name(backend), features.dtype)
        rows, valid = _sup_con_ring(features, mine, anchored, scale, columns)
    else:
        every = gather_rows(features, ranks, group=group)
        own = torch.arange(ranks.first, ranks.first + items, device=features.device)
        anchors = features[:, :anchored].transpose(0, 1).flatten(0, 1)
        contrast = every.transpose(0, 1).flatten(0, 1)
        columns_of_own = torch.cat([own + v * ranks.total for v in range(anchored)])
        options: dict[str, Any] = {"own": columns_of_own, "scale": scale, "backend": backend}
        if mask is None:
            classes = supcon.class_indices(gather_rows(mine, ranks, group=group))
        if not items:
            rows, valid = idle(features, every, scale), own
        elif mask is None:
            rows, valid = supcon.class_rows(
                anchors, contrast, classes[own].repeat(anchored), classes.repeat(views), **options
            )
        else:
            supcon.check_mask(mask, items, ranks.total)
            found = supcon.masked_positives(features, mask.to(features.device), anchored, every, ranks.first)
            rows, valid = supcon.weighted_rows(anchors, contrast, *found, **options)
    number = valid.sum()
    dist.all_reduce(number, group=group)
    return temperature / base_temperature * rows.sum() * size / number.clamp(min=1)


def _sup_con_ring(
    features: Tensor, labels: Tensor, anchored: int, scale: float | Tensor, columns: ring.Columns
) -> tuple[Tensor, Tensor]:
    """Losses of the anchors [anchored B] and which of them have a positive: features [B, V, D], labels [B]."""
    items, views = features.shape[:2]
    contrast = widened(features).transpose(0, 1).flatten(0, 1)
    anchors = contrast[: anchored * items]
    classes = labels.sort().values  # a class is stored at its first position, so the host need not know their number
    own = torch.searchsorted(classes, labels).clamp(max=max(items - 1, 0))
    found = ring.statistics(anchors, contrast, scale, columns, col_ids=labels.repeat(views), classes=classes)
    assert found.row_lse is not None and found.class_sums is not None and found.class_counts is not None
    own = own.repeat(anchored)
    towards, number = found.class_sums[own] - anchors, found.class_counts[own] - 1
    valid = number > 0
    positive = (anchors * towards).sum(-1) * scale / number.clamp(min=1)
    return torch.where(valid, found.row_lse - positive, 0), valid
