"""Supervised contrastive losses: the several positives of an anchor enter through sums over classes."""

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

_BLOCK = 1 << 22  # entries of a mask that are widened at a time: 16 MiB in fp32
NONE = 1e-6  # a weight up to which an anchor has no positive


def check_views(
    features: Tensor, labels: Tensor | None, base_temperature: float, contrast_mode: str, *, any_labels: bool = False
) -> int:
    """The number of items; raises ValueError or TypeError naming the argument. Labels must be integers unless
    `any_labels`, as SupContrast takes them."""
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
    """ValueError or TypeError unless mask is [items, items] or, of `every` item of all ranks, [items, every], boolean
    or of finite weights that are not negative."""
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
    """Supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2); without labels, SimCLR's.

    features [B, V, D] (V views; the caller normalises, as SupContrast has it), labels [B] integers. Or mask [B, B] says
    which items are positives of which: boolean, as for items of several labels, or weights of at least 0, by which an
    anchor's positive scores are averaged. All views of item j are positives of item i with weight mask[i, j], but never
    the anchor itself; mask may be asymmetric, and no gradient flows to it. contrast_mode "all" takes every view as an
    anchor, "one" only the first. Scaled by temperature / base_temperature. An anchor without any positive makes the
    original 0/0; here it contributes nothing and does not count in the mean (0 if none is left).

    Cost 4N with N = 2 (B V)^2 D, on a CPU 3N where every anchor has a positive; O(B V D) memory: the positives enter
    through sums over classes. A mask adds 2 B^2 D FLOP each way and at most 16 MiB beside itself. Raises ValueError or
    TypeError naming the argument.
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
    if labels is None and contrast_mode == "all" and views == 2:  # one positive an anchor: a single autograd node
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
    """log sum of all candidates but the own one, minus the mean score of the same class: [A], and which exist.

    anchors [A, D], contrast [C, D]; classes count from 0; own [A] is the column that is the anchor itself, `aligned`
    says that own_i is i. A row without a positive is 0 and False.
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
    """The mean of class_rows over the rows that exist, or over `every` row; column i is anchor i itself."""
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
        # Where all rows count alike, their gradients can be computed with the value: 3N instead of 4N.
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
    """Of the anchors [anchored B], the first views of all items first: the mean of an anchor's positives [A, D], and 1
    where it has any, 0 where not [A].

    features [B, V, D], mask [B, B]. Or the items are rows first, first + 1, ... of `every` [N, V, D], the views of all
    ranks, and mask is [B, N]. The anchor itself is left out before the sums: taken off afterwards, a large weight of an
    item with itself would round off the others.
    """
    wide = widened(features)
    views, dtype = wide.shape[1], wide.dtype
    own = mask.detach().diagonal(first).to(dtype)
    items = wide.sum(1)
    others, weight = _sums_of_others(mask.detach(), items if every is None else widened(every).sum(1), first)
    sums = others[:, None].expand(-1, anchored, -1)
    if views > 1:  # the item's other views
        sums = sums + (items[:, None] - wide[:, :anchored]) * own[:, None, None]
    towards = sums.transpose(0, 1).flatten(0, 1)
    weight = (views * weight + (views - 1) * own).repeat(anchored)
    exists = weight > 0
    return towards / torch.where(exists, weight, 1)[:, None], exists.to(dtype)


def _sums_of_others(mask: Tensor, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """sum_j mask_ij rows_j [B, D] and sum_j mask_ij [B] over the j that are not first + i."""
    columns = torch.cat([rows, torch.ones_like(rows[:, :1])], -1)
    if torch.compiler.is_compiling() or transforms.active():
        own = torch.ones_like(mask, dtype=torch.bool).triu(first).tril(first)
        found = mask.to(rows.dtype).masked_fill(own, 0) @ columns
    else:
        found = _MaskedProduct.apply(mask, columns, first, False)
    return found[:, :-1], found[:, -1]


class _MaskedProduct(torch.autograd.Function):
    """W @ t, or W^T @ t if `transposed`, W being the mask without its diagonal `offset`: widened a block of rows at a
    time, so that neither pass holds a copy of the whole mask."""

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
    """The sum of an anchor's positives, [A, D], and their number, [A]."""
    number = row_class.numel() + col_class.numel()  # not the largest class: reading it would wait for a GPU
    towards = rows_at(sums_of(number, col_class, contrast), row_class)
    weight = rows_at(sums_of(number, col_class, contrast.new_ones(col_class.shape)), row_class)
    if own is None:
        return towards, weight
    itself = contrast[: anchors.shape[0]] if aligned else contrast.index_select(0, own)
    return towards - itself, weight - 1


def pair_mean(views: Tensor, *, scale: float | Tensor, backend: str | None = None) -> Tensor:
    """The mean over anchors i of views [2 B, D] whose only positive is the other view, i + B; the rest is negative."""
    rows = views.shape[0]
    prepared = api.prepare(views, views, scale, pairs="off_diagonal", positive_shift=rows // 2)
    return api.loss(prepared, w_row=1 / rows, w_pos=1 / rows, backend=backend)


def class_indices(labels: Tensor) -> Tensor:
    """Labels numbered from 0, [n]: as torch.unique's inverse, with shapes that torch.export knows beforehand."""
    ordered, order = labels.reshape(-1).sort(stable=True)
    new = torch.cat([ordered.new_zeros(1, dtype=torch.long), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, new.cumsum(0))


def _widened(anchors: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the accumulation type; one tensor stays one.

    Products are taken in it too. The positives enter apart from the softmax, whose entries would be rounded in 16-bit
    tiles before they meet: near convergence nothing of the gradient would be left.
    """
    x = widened(anchors)
    return x, x if contrast is anchors else widened(contrast)


def _positive(anchors: Tensor, towards: Tensor, scale: float | Tensor, weight: Tensor) -> Tensor:
    """The mean score of an anchor's positives, [A]."""
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
