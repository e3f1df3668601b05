"""The student's expected scores under the teacher's softmax, for DistillClipLoss, without storing a score matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.common.dtypes import accumulate_dtype

_PANEL = 1 << 22  # teacher's scores held at a time: 16 MiB in fp32


def expected_score(
    rows: Tensor,
    columns: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    teacher_scale: Tensor | float,
    *,
    both: bool,
) -> Tensor:
    """1/B sum_ij P_ij <row_i, column_j>, where P_ij is the teacher's softmax of row i over columns j. With `both`, P is
    the average of this and the softmax of column j over rows i; rows and columns then have the same number.

    Student features are [B, D] and [N, D], teacher features [B, D'] and [N, D']. The gradients P @ columns and P^T @
    rows need no student scores. Cost: 3 x 2 B N D FLOP and 1 or 2 x 2 B N D' FLOP; O((B + N) D) memory plus a panel of
    16 MiB. If the teacher requires a gradient, its scores are materialised.
    """
    wide = accumulate_dtype(rows.dtype)
    learnt = any(isinstance(t, Tensor) and t.requires_grad for t in (teacher_rows, teacher_columns, teacher_scale))
    if (learnt and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        weights = _weights(teacher_rows.to(wide), teacher_columns.to(wide), teacher_scale, both)
        return (rows.to(wide) * (weights @ columns.to(wide))).sum() / rows.shape[0]
    return _Expectation.apply(rows, columns, teacher_rows, teacher_columns, teacher_scale, both)


def _weights(teacher_rows: Tensor, teacher_columns: Tensor, scale: Tensor | float, both: bool) -> Tensor:
    scores = scale * teacher_rows @ teacher_columns.mT
    return (scores.softmax(1) + scores.softmax(0)) / 2 if both else scores.softmax(1)


def from_scores(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    teacher_scale: Tensor | float,
) -> Any:
    """(contrastive loss, distillation loss) of a square batch from stored scores, averaged over both directions."""
    wide = accumulate_dtype(rows.dtype)
    scores = scale * rows.to(wide) @ columns.to(wide).mT
    weights = _weights(teacher_rows.to(wide), teacher_columns.to(wide), teacher_scale, True)
    log_sums = (scores.logsumexp(1) + scores.logsumexp(0)).mean() / 2
    return log_sums - scores.diagonal().mean(), log_sums - (weights * scores).sum() / rows.shape[0]


class _Expectation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        teacher_rows: Tensor,
        teacher_columns: Tensor,
        teacher_scale: Tensor | float,
        both: bool,
    ) -> Any:
        by_row, by_column = _contract(rows, columns, teacher_rows, teacher_columns, teacher_scale, both)
        ctx.save_for_backward(rows, columns, teacher_rows, teacher_columns, by_row, by_column)
        ctx.settings = teacher_scale, both
        return (rows.to(by_row.dtype) * by_row).sum() / rows.shape[0]

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        rows, columns, teacher_rows, teacher_columns, by_row, by_column = ctx.saved_tensors
        teacher_scale, both = ctx.settings
        g = g / rows.shape[0]
        if torch.is_grad_enabled():
            wide = by_row.dtype
            weights = _weights(teacher_rows.to(wide), teacher_columns.to(wide), teacher_scale, both)
            by_row, by_column = weights @ columns.to(wide), weights.mT @ rows.to(wide)
        return (g * by_row).to(rows.dtype), (g * by_column).to(columns.dtype), None, None, None, None


def _contract(
    rows: Tensor, columns: Tensor, teacher_rows: Tensor, teacher_columns: Tensor, scale: Tensor | float, both: bool
) -> tuple[Tensor, Tensor]:
    """P @ columns [B, D] and P^T @ rows [N, D], in the accumulation type."""
    wide = accumulate_dtype(rows.dtype)
    rows, columns = rows.to(wide), columns.to(wide)
    teacher_rows, teacher_columns = scale * teacher_rows.to(wide), teacher_columns.to(wide)
    step = max(1, _PANEL // columns.shape[0])
    parts = [slice(first, first + step) for first in range(0, rows.shape[0], step)]
    by_row, by_column = torch.empty_like(rows), torch.zeros_like(columns)
    kept = teacher_rows @ teacher_columns.mT if len(parts) == 1 else None
    down = None
    if both:  # the softmaxes over columns need all rows first
        panels = (teacher_rows[part] @ teacher_columns.mT for part in parts) if kept is None else (kept,)
        down = torch.stack([panel.logsumexp(0) for panel in panels]).logsumexp(0)
    for part in parts:
        scores = teacher_rows[part] @ teacher_columns.mT if kept is None else kept
        weights = scores.softmax(1)
        if down is not None:
            weights.add_(scores.sub_(down).exp_()).mul_(0.5)
        torch.mm(weights, columns, out=by_row[part])
        by_column.addmm_(weights.mT, rows[part])
    return by_row, by_column
