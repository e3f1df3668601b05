"""Both losses from labels, without storing the scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import common, supcon
from ...ops.dot_critic import api
from .dense import softplus


class Classes(NamedTuple):
    """The classes of rows and columns, numbered from 0."""

    row: Tensor  # [B]
    column: Tensor  # [N]
    own: Tensor | None  # [B], the column that is the row itself
    positives: Tensor  # [B], number of positives; likewise negatives
    negatives: Tensor  # [B]

    @classmethod
    def of(cls, labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> Classes:
        if labels is ref_labels:
            row = column = torch.unique(labels, return_inverse=True)[1]
        else:
            both = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)[1]
            row, column = both.split([labels.shape[0], ref_labels.shape[0]])
        sizes = torch.bincount(column, minlength=int(row.max()) + 1)[row]
        return cls(row, column, own, sizes if own is None else sizes - 1, column.shape[0] - sizes)


def negatives_log_sum(x: Tensor, y: Tensor, scale: float | Tensor, row_class: Tensor, col_class: Tensor) -> Tensor:
    """log-sum-exp of each row's scores against the other classes, [B]; -inf if there are none."""
    found = api.statistics(x, y, scale, row_ids=row_class, col_ids=col_class, pairs="unequal_ids").row_lse
    assert found is not None
    return found


def twins_mean(x: Tensor, y: Tensor, scale: float | Tensor, classes: Classes) -> Tensor | None:
    """Both losses if positives form a one-to-one mapping and all other candidates are negatives: the cross-entropy of a
    permutation, 3N FLOP. Returns None for other labels."""
    items = classes.row.shape[0]
    if not bool((classes.positives == 1).all()):
        return None
    if x is y:
        # two rows per class: sorted so that a row's positive is half a batch away
        order = torch.argsort(classes.row, stable=True)
        order = torch.cat([order[0::2], order[1::2]])
        views = x if bool((order[1:] > order[:-1]).all()) else x[order]
        prepared = api.prepare(views, views, scale, pairs="off_diagonal", positive_shift=items // 2)
    elif classes.own is None and bool((torch.bincount(classes.row) <= 1).all()):
        # one row and one column per class: columns in the order of the rows, followed by columns without a row
        place = torch.full((int(classes.column.max()) + 1,), items, device=x.device)
        place[classes.row] = torch.arange(items, device=x.device)
        order = torch.argsort(place[classes.column], stable=True)
        columns = y if bool((order[1:] > order[:-1]).all()) else y[order]
        prepared = api.prepare(x, columns, scale, positive_shift=0)
    else:
        return None
    return common.over_groups(api.loss(prepared, w_row=1 / items, w_pos=1 / items))


def class_mean(x: Tensor, y: Tensor, scale: float | Tensor, classes: Classes) -> Tensor | None:
    """The mean SupCon loss if no anchor has exactly one positive (its loss may be near 0). Returns None for other
    labels, and if the batch is not scored against itself."""
    if x is not y or classes.own is None or bool((classes.positives == 1).any()):
        return None
    return supcon.class_mean(x, y, classes.row, classes.column, scale=scale)


def sup_con_rows(x: Tensor, y: Tensor, scale: float | Tensor, classes: Classes) -> Tensor:
    """SupCon losses [B]. Rows with one positive p use log(1 + exp(log-sum-exp of the negatives - S_p)), which is
    accurate near 0; rows with more positives have a loss of at least log 2."""
    single = classes.positives == 1
    losses = x.new_zeros(x.shape[0])
    for rows, function in ((single, _single_rows), (classes.positives > 1, _several_rows)):
        if bool(rows.all()):
            return function(x, y, scale, classes)
        if bool(rows.any()):
            index = rows.nonzero().squeeze(1)
            own = None if classes.own is None else classes.own[index]
            part = Classes(classes.row[index], classes.column, own, classes.positives[index], classes.negatives[index])
            losses = losses.index_copy(0, index, function(x[index], y, scale, part))
    return losses


def _single_rows(x: Tensor, y: Tensor, scale: float | Tensor, classes: Classes) -> Tensor:
    sums = y.new_zeros(int(torch.maximum(classes.row.max(), classes.column.max())) + 1, y.shape[1])
    positive = sums.index_add(0, classes.column, y)[classes.row]
    if classes.own is not None:
        positive = positive - y[classes.own]
    rest = negatives_log_sum(x, y, scale, classes.row, classes.column)
    return softplus(rest - (x * positive).sum(1) * scale)


def _several_rows(x: Tensor, y: Tensor, scale: float | Tensor, classes: Classes) -> Tensor:
    return supcon.class_rows(x, y, classes.row, classes.column, own=classes.own, scale=scale)[0]
