"""Rows of the supervised contrastive losses: several positives an anchor, which enter through sums over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.common.dtypes import accumulate_dtype
from ..ops.dot_critic import api
from . import common

_NONE = 1e-6  # a weight up to which an anchor has no positive


def check_views(features: Tensor, labels: Tensor | None, base_temperature: float, contrast_mode: str) -> int:
    """The number of items; raises ValueError naming the argument."""
    if not isinstance(features, Tensor) or features.dim() < 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must have shape [B, views, D], got {shape}")
    if 0 in features.shape:
        raise ValueError(f"features must not be empty, got shape {tuple(features.shape)}")
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"contrast_mode must be 'all' or 'one', got {contrast_mode!r}")
    if not base_temperature > 0:
        raise ValueError(f"base_temperature must be positive, got {base_temperature}")
    items = features.shape[0]
    if labels is not None and labels.numel() != items:
        raise ValueError(f"labels must hold {items} entries, one an item, got shape {tuple(labels.shape)}")
    return items


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float = 0.07,
    contrast_mode: str = "all",
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2); without labels, SimCLR's.

    features [B, V, D] (V views; the caller normalises, as SupContrast has it), labels [B] integers. contrast_mode "all"
    takes every view as an anchor, "one" only the first. Scaled by temperature / base_temperature. An anchor without
    any positive makes the original 0/0; here it contributes nothing and does not count in the mean (0 if none is
    left). Cost 4N with N = 2 (B V)^2 D, on a CPU 3N where every anchor has a positive; O(B V D) memory: the positives
    enter through sums over classes.
    """
    items = check_views(features, labels, base_temperature, contrast_mode)
    features = features.flatten(2)
    views = features.shape[1]
    if labels is None:
        labels = torch.arange(items, device=features.device)
    contrast = features.transpose(0, 1).flatten(0, 1)
    anchors = contrast if contrast_mode == "all" else contrast[:items]
    classes = torch.unique(labels.reshape(-1).to(features.device), return_inverse=True)[1]
    loss = class_mean(
        anchors,
        contrast,
        classes.repeat(anchors.shape[0] // items),
        classes.repeat(views),
        scale=common.inverse_temperature(temperature),
        backend=backend,
    )
    return temperature / base_temperature * loss



def class_rows(
    anchors: Tensor,
    contrast: Tensor,
    row_class: Tensor,
    col_class: Tensor,
    *,
    own: Tensor | None,
    aligned: bool = False,
    scale: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """log sum of all candidates but the own one, minus the mean score of the same class: [A], and which exist.

    anchors [A, D], contrast [C, D]; classes count from 0; own [A] is the column that is the anchor itself, `aligned`
    says that own_i is i. A row without a positive is 0 and False.
    """
    towards, weight = _of_classes(anchors, contrast, row_class, col_class, own, aligned)
    return weighted_rows(anchors, contrast, towards, weight, own=own, aligned=aligned, scale=scale, backend=backend)


def class_mean(
    anchors: Tensor,
    contrast: Tensor,
    row_class: Tensor,
    col_class: Tensor,
    *,
    every: bool = False,
    scale: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    """The mean of class_rows over the rows that exist, or over `every` row; column i is anchor i itself."""
    own = torch.arange(anchors.shape[0], device=anchors.device)
    towards, weight = _of_classes(anchors, contrast, row_class, col_class, own, True)
    compiled = torch.compiler.is_compiling()
    if anchors.device.type == "cpu" and not compiled and bool((weight > _NONE).all()):
        # Where all rows count alike, their gradients can be computed with the value: 3N instead of 4N.
        prepared = api.prepare(anchors, contrast, scale, pairs="off_diagonal")
        mean = api.loss(prepared, w_row=1 / anchors.shape[0], backend=backend)
        return mean - _positive(anchors, towards, scale, weight).mean()
    rows, valid = weighted_rows(
        anchors, contrast, towards, weight, own=own, aligned=True, scale=scale, backend=backend
    )
    return rows.mean() if every else rows.sum() / valid.sum().clamp(min=1)


def _of_classes(
    anchors: Tensor, contrast: Tensor, row_class: Tensor, col_class: Tensor, own: Tensor | None, aligned: bool
) -> tuple[Tensor, Tensor]:
    """The sum of an anchor's positives, [A, D], and their number, [A]."""
    wide = accumulate_dtype(anchors.dtype)
    number = int(torch.maximum(row_class.max(), col_class.max())) + 1
    sums = torch.zeros(number, contrast.shape[1], dtype=wide, device=anchors.device)
    towards = sums.index_add(0, col_class, contrast.to(wide)).index_select(0, row_class)
    weight = torch.bincount(col_class, minlength=number)[row_class].to(wide)
    if own is None:
        return towards, weight
    itself = contrast[: anchors.shape[0]] if aligned else contrast.index_select(0, own)
    return towards - itself.to(wide), weight - 1


def _positive(anchors: Tensor, towards: Tensor, scale: float | Tensor, weight: Tensor) -> Tensor:
    """The mean score of an anchor's positives, [A]."""
    return (anchors.to(towards.dtype) * towards).sum(-1) * scale / weight


def weighted_rows(
    anchors: Tensor,
    contrast: Tensor,
    towards: Tensor,
    weight: Tensor,
    *,
    own: Tensor | None,
    aligned: bool = False,
    scale: float | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """class_rows from towards_i = sum_p m_ip contrast_p [A, D] and weight_i = sum_p m_ip [A]."""
    valid = weight > _NONE
    positive = _positive(anchors, towards, scale, torch.where(valid, weight, 1))
    if own is None or aligned:
        pairs = "off_diagonal" if aligned else "all"
        found = api.statistics(anchors, contrast, scale, pairs=pairs, backend=backend)
    else:
        columns = torch.arange(contrast.shape[0], device=anchors.device)
        found = api.statistics(
            anchors, contrast, scale, row_ids=own, col_ids=columns, pairs="unequal_ids", backend=backend
        )
    assert found.row_lse is not None
    return torch.where(valid, found.row_lse - positive, 0), valid
