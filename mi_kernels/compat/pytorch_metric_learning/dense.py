"""Both losses from scores that are stored: of a small batch, of a block of rows, or of a distance's whole matrix.

Differences are formed between the log-sum of the negatives and that of the positives, log(1 + exp(difference)), so that
a loss of 1e-20 is 1e-20 and not the rounding of two large numbers: reducers decide on whether a loss is above 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t), to full precision: F.softplus is the identity above 20, which is 2e-9 off."""
    return -F.logsigmoid(-t)


def log_sum(scores: Tensor, mask: Tensor) -> Tensor:
    """log sum exp over the pairs of the mask, [B]; the least finite number where a row has none, so that no gradient
    becomes NaN."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).logsumexp(1)


def nt_xent_sum(scores: Tensor, rest: Tensor, positive: Tensor) -> Tensor:
    """Sum over the positive pairs [B, N] of log(1 + exp(rest_a - S_ap)); rest [B]: the negatives' log-sum."""
    return softplus(rest[:, None] - scores).masked_fill(~positive, 0).sum()


def nt_xent_pairs(scores: Tensor, rest: Tensor, anchor: Tensor, positive: Tensor) -> Tensor:
    """The same of listed pairs [P] apart."""
    return softplus(rest[anchor] - scores[anchor, positive])


def weighted_log_sum(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """log_sum over listed pairs, which count as often as they are listed."""
    place = rows * scores.shape[1] + columns
    counts = scores.new_zeros(scores.numel())
    counts = counts.scatter_add_(0, place, counts.new_ones(()).expand(place.shape)).view(scores.shape)
    return log_sum(scores + counts.clamp(min=1).log(), counts > 0)


def sup_con_rows(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Per row, the log-sum of positives and negatives minus the mean score of the positives, [B]; 0 without positives.

    At a single positive its log-sum is its score, and the second term is 0; at more it is at least log 2.
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
    """Positive and negative pairs, [B, N] each; own [B]: the column that is the row itself, in neither."""
    same = labels[:, None] == ref_labels
    if own is None:
        return same, ~same
    positive = same.clone()
    positive[torch.arange(labels.shape[0], device=labels.device), own] = False
    return positive, ~same
