"""Both losses from stored scores: of a small batch, of a block of rows, or the full matrix of a distance.

Losses are computed as log(1 + exp(d)), where d is the difference between the log-sum-exps of negatives and positives. A
loss of 1e-20 is then accurate instead of being the rounding error of two large numbers. This matters because reducers
test whether a loss is above 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t) to full precision. F.softplus is the identity above 20, an error of 2e-9."""
    return -F.logsigmoid(-t)


def log_sum(scores: Tensor, mask: Tensor) -> Tensor:
    """log-sum-exp over the pairs of the mask, [B]. A row without pairs gets the least finite number, so that no
    gradient is NaN."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).logsumexp(1)


def nt_xent_sum(scores: Tensor, rest: Tensor, positive: Tensor) -> Tensor:
    """Sum over the positive pairs [B, N] of log(1 + exp(rest_a - S_ap)); rest [B] is the log-sum-exp of the
    negatives."""
    return softplus(rest[:, None] - scores).masked_fill(~positive, 0).sum()


def nt_xent_pairs(scores: Tensor, rest: Tensor, anchor: Tensor, positive: Tensor) -> Tensor:
    """The individual terms of nt_xent_sum for listed pairs [P]."""
    return softplus(rest[anchor] - scores[anchor, positive])


def weighted_log_sum(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """log_sum over listed pairs; a pair counts as often as it is listed."""
    place = rows * scores.shape[1] + columns
    counts = scores.new_zeros(scores.numel())
    counts = counts.scatter_add_(0, place, counts.new_ones(()).expand(place.shape)).view(scores.shape)
    return log_sum(scores + counts.clamp(min=1).log(), counts > 0)


def sup_con_rows(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Per row, the log-sum-exp of positives and negatives minus the mean score of the positives, [B]; 0 without
    positives.

    With one positive, its log-sum-exp equals its score and the second term is 0. With more, the second term is at least
    log 2.
    """
    number = positive.sum(1)
    among = log_sum(scores, positive)
    mean = scores.masked_fill(~positive, 0).sum(1) / number.clamp(min=1)
    return torch.where(number > 0, softplus(log_sum(scores, negative) - among) + (among - mean), 0)


def listed_mask(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask[rows, columns] = True
    return mask


def label_masks(labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks of positive and negative pairs, [B, N] each. own [B] is the column of the row itself, which is in
    neither."""
    same = labels[:, None] == ref_labels
    if own is None:
        return same, ~same
    positive = same.clone()
    positive[torch.arange(labels.shape[0], device=labels.device), own] = False
    return positive, ~same
