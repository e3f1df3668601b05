"""Supervised contrastive losses. The positives of an anchor enter through sums of features over classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.common import transforms
from ..ops.common.autograd import readable
from ..ops.common.checks import FLOATS, check_choice, check_number, check_same_device, check_tensor
from ..ops.common.precision import outside_autocast
from ..ops.common.rows import rows_at, sums_of, widened
from ..ops.dot_critic import api
from . import common

_BLOCK = 1 << 22  # number of mask entries converted to floats at a time: 16 MiB in fp32
NONE = 1e-6  # an anchor whose positives have at most this total weight counts as having none


def check_views(
    features: Tensor, labels: Tensor | None, base_temperature: float, contrast_mode: str, *, any_labels: bool = False
) -> int:
    """Returns the number of items. Raises ValueError or TypeError that names the argument. Labels must be integers
    unless `any_labels` is set, because SupContrast accepts labels of any type."""
    check_tensor("features", features)
    if features.dim() < 3:
        raise ValueError(f"features must have shape [B, views, D], got {tuple(features.shape)}")
    if 0 in features.shape:
        raise ValueError(f"features must not be empty, got shape {tuple(features.shape)}")
    if features.dtype not in FLOATS:
        raise ValueError(f"features must be float64, float32, bfloat16 or float16, got {features.dtype}")
    check_choice("contrast_mode", contrast_mode, ("all", "one"))
    check_number("base_temperature", base_temperature, positive=True)
    items = features.shape[0]
    if labels is None:
        return items
    check_tensor("labels", labels)
    if labels.is_complex():
        raise ValueError(f"labels must be real, got {labels.dtype}")
    if not any_labels and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels must be of an integer type, the class of each item, got {labels.dtype}")
    if labels.is_floating_point() and readable(labels) and bool(labels.isnan().any()):
        raise ValueError("labels must not be NaN: NaN equals no label, not even itself")
    if labels.numel() != items:
        raise ValueError(f"labels must hold {items} entries, one an item, got shape {tuple(labels.shape)}")
    return items


def check_mask(mask: Tensor, items: int, every: int | None = None) -> None:
    """Raises ValueError or TypeError unless mask is [items, items], or [items, every] if `every` counts the items of
    all ranks, with boolean entries or finite non-negative weights."""
    shape = (items, items if every is None else every)
    check_tensor("mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise ValueError(f"mask must be boolean or hold floating-point weights, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {shape}, one entry a pair of items, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool or not readable(mask):
        return
    low, high = (float(bound) for bound in mask.detach().aminmax())
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"mask must hold finite weights of at least 0, got {low} to {high}")


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float = 0.07,
    contrast_mode: str = "all",
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2), in nats; without labels and mask, SimCLR's
    loss.

    features: [B, V, D], V views of B items, normalised by the caller as in SupContrast.
    labels: integers [B]. Items with equal labels are positives of each other.
    mask: [B, B], an alternative to labels. mask[i, j] is the weight of all views of item j as positives of item i:
        boolean, or weights of at least 0 by which the scores of the positives are averaged. It may be asymmetric and
        receives no gradient. An anchor is never its own positive.
    temperature, base_temperature: scores are divided by temperature, and the loss is multiplied by
        temperature / base_temperature.
    contrast_mode: "all" uses every view as an anchor, "one" only the first view.
    backend: name of a backend; by default chosen from the device.

    Anchors without a positive are left out of the mean, which is 0 if no anchor is left; the original code returns NaN
    for them. Cost: 4N with N = 2 (B V)^2 D FLOP, or 3N on a CPU if every anchor has a positive; O(B V D) memory. A mask
    adds 2 B^2 D FLOP in each pass and at most 16 MiB. Raises ValueError or TypeError that names the argument.
    """
    items = check_views(features, labels, base_temperature, contrast_mode)
    scale = common.inverse_temperature(temperature, torch.Size(()), features.dtype)
    if mask is not None:
        if labels is not None:
            raise ValueError("labels and mask cannot both be given: both say which items are positives")
        check_mask(mask, items)
        if mask.is_meta != features.is_meta:
            check_same_device("mask", mask, "features", features)
    features = features.flatten(2)
    views = features.shape[1]
    contrast = features.transpose(0, 1).flatten(0, 1)
    anchors = contrast if contrast_mode == "all" else contrast[:items]
    if mask is not None:
        towards, weight = masked_positives(features, mask.to(features.device), anchors.shape[0] // items)
        loss = weighted_mean(anchors, contrast, towards, weight, every=False, scale=scale, backend=backend)
        return temperature / base_temperature * loss
    if labels is None and contrast_mode == "all" and views == 2:  # one positive per anchor: one autograd node is enough
        loss = pair_mean(contrast, scale=scale, backend=backend)
        return temperature / base_temperature * loss
    device = features.device
    classes = torch.arange(items, device=device) if labels is None else class_indices(labels.to(device))
    loss = class_mean(
        anchors,
        contrast,
        classes.repeat(anchors.shape[0] // items),
        classes.repeat(views),
        scale=scale,
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
    """The loss of each anchor, [A], and whether the anchor has a positive, [A].

    The loss is the log-sum-exp over all candidates except the anchor itself, minus the mean score of the candidates of
    the same class. anchors [A, D], contrast [C, D]; classes are numbered from 0; own [A] is the column of the anchor
    itself, and `aligned` means own_i = i. An anchor without a positive has loss 0.
    """
    x, y = _widened(anchors, contrast)
    towards, weight = _of_classes(x, y, row_class, col_class, own, aligned)
    return weighted_rows(x, y, towards, weight, own=own, aligned=aligned, scale=scale, backend=backend)


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
    """The mean of class_rows over the anchors that have a positive, or over `every` anchor; column i is anchor i
    itself."""
    own = torch.arange(anchors.shape[0], device=anchors.device)
    x, y = _widened(anchors, contrast)
    towards, weight = _of_classes(x, y, row_class, col_class, own, True)
    return weighted_mean(x, y, towards, weight, every=every, scale=scale, backend=backend)


def weighted_mean(
    anchors: Tensor,
    contrast: Tensor,
    towards: Tensor,
    weight: Tensor,
    *,
    every: bool,
    scale: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    """class_mean from towards_i = sum_p m_ip contrast_p [A, D] and weight_i = sum_p m_ip [A]; column i is anchor i."""
    x, y = _widened(anchors, contrast)
    if readable(weight) and bool((weight > NONE).all()):
        # If all rows have the same weight, gradients can be computed together with the value: 3N instead of 4N.
        prepared = api.prepare(x, y, scale, pairs="off_diagonal")
        mean = api.loss(prepared, w_row=1 / anchors.shape[0], backend=backend)
        return mean - _positive(x, towards, scale, weight).mean()
    own = torch.arange(anchors.shape[0], device=anchors.device)
    rows, valid = weighted_rows(x, y, towards, weight, own=own, aligned=True, scale=scale, backend=backend)
    return rows.mean() if every else rows.sum() / valid.sum().clamp(min=1)


@outside_autocast
def masked_positives(
    features: Tensor, mask: Tensor, anchored: int, every: Tensor | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The weighted mean of each anchor's positives, [A, D], and 1 or 0 for anchors with and without positives, [A].

    Anchors are ordered by view: first the first views of all items. features [B, V, D], mask [B, B]. In the distributed
    loss the items are the rows first, first + 1, ... of `every` [N, V, D], the views of all ranks, and mask is [B, N].
    The anchor itself is excluded before summing: if it were subtracted afterwards, a large weight of an item with
    itself would round away the other terms.
    """
    wide = widened(features)
    views, dtype = wide.shape[1], wide.dtype
    own = mask.detach().diagonal(first).to(dtype)
    items = wide.sum(1)
    others, weight = _sums_of_others(mask.detach(), items if every is None else widened(every).sum(1), first)
    sums = others[:, None].expand(-1, anchored, -1)
    if views > 1:  # adds the item's other views
        sums = sums + (items[:, None] - wide[:, :anchored]) * own[:, None, None]
    towards = sums.transpose(0, 1).flatten(0, 1)
    weight = (views * weight + (views - 1) * own).repeat(anchored)
    exists = weight > 0
    return towards / torch.where(exists, weight, 1)[:, None], exists.to(dtype)


def _sums_of_others(mask: Tensor, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """sum_j mask_ij rows_j [B, D] and sum_j mask_ij [B] over all j != first + i."""
    columns = torch.cat([rows, torch.ones_like(rows[:, :1])], -1)
    if torch.compiler.is_compiling() or transforms.active():
        own = torch.ones_like(mask, dtype=torch.bool).triu(first).tril(first)
        found = mask.to(rows.dtype).masked_fill(own, 0) @ columns
    else:
        found = _MaskedProduct.apply(mask, columns, first, False)
    return found[:, :-1], found[:, -1]


class _MaskedProduct(torch.autograd.Function):
    """W @ t, or W^T @ t if `transposed`, where W is the mask without its diagonal `offset`. Converts one block of rows
    of the mask at a time, so that neither pass holds a floating-point copy of the whole mask."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, t: Tensor, offset: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.settings = (offset, transposed)
        found = t.new_zeros(mask.shape[1 if transposed else 0], t.shape[1])
        step = max(1, _BLOCK // mask.shape[1])
        for first in range(0, mask.shape[0], step):
            part = slice(first, first + step)
            block = mask[part].to(t.dtype, copy=True)
            block.diagonal(first + offset).zero_()
            if transposed:
                found.addmm_(block.mT, t[part])
            else:
                found[part] = block @ t
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        offset, transposed = ctx.settings
        return None, _MaskedProduct.apply(mask, g, offset, not transposed), None, None


def _of_classes(
    anchors: Tensor, contrast: Tensor, row_class: Tensor, col_class: Tensor, own: Tensor | None, aligned: bool
) -> tuple[Tensor, Tensor]:
    """The sum of each anchor's positives, [A, D], and their number, [A]."""
    number = row_class.numel() + col_class.numel()  # an upper limit: reading the largest class would wait for a GPU
    towards = rows_at(sums_of(number, col_class, contrast), row_class)
    weight = rows_at(sums_of(number, col_class, contrast.new_ones(col_class.shape)), row_class)
    if own is None:
        return towards, weight
    itself = contrast[: anchors.shape[0]] if aligned else contrast.index_select(0, own)
    return towards - itself, weight - 1


def pair_mean(views: Tensor, *, scale: float | Tensor, backend: str | None = None) -> Tensor:
    """The mean loss over the views [2 B, D]. The only positive of view i is the other view, i + B."""
    rows = views.shape[0]
    prepared = api.prepare(views, views, scale, pairs="off_diagonal", positive_shift=rows // 2)
    return api.loss(prepared, w_row=1 / rows, w_pos=1 / rows, backend=backend)


def class_indices(labels: Tensor) -> Tensor:
    """Renumbers labels [n] from 0, like the inverse of torch.unique, but with shapes that torch.export can infer."""
    ordered, order = labels.reshape(-1).sort(stable=True)
    new = torch.cat([ordered.new_zeros(1, dtype=torch.long), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, new.cumsum(0))


def _widened(anchors: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Converts both to the accumulation type; if both are the same tensor, the results are the same tensor too.

    Products are computed in this type as well. The gradients of the positives and of the softmax are computed
    separately and almost cancel near convergence; with the softmax rounded to 16 bits, only noise would remain.
    """
    x = widened(anchors)
    return x, x if contrast is anchors else widened(contrast)


def _positive(anchors: Tensor, towards: Tensor, scale: float | Tensor, weight: Tensor) -> Tensor:
    """The mean score of each anchor's positives, [A]."""
    return (anchors * towards).sum(-1) * scale / weight


@outside_autocast
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
    anchors, contrast = _widened(anchors, contrast)
    valid = weight > NONE
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
