"""NTXentLoss, SupConLoss, SelfSupervisedLoss and CrossBatchMemory of pytorch-metric-learning (2.8, 2.9).

With labels and a cosine or dot-product distance nothing B x N is stored: the original keeps positive pairs x negative
pairs numbers (1.2 GB for 512 embeddings). With an indices_tuple, or another distance, the B x N scores are stored,
never pairs x pairs. Reducers, distances, regularizers and miners of the original plug in. Differences:
* 16-bit embeddings give an fp32 loss; the original's log(x + tiny) caps a half-precision loss at about 9.7 and cuts
  its gradient;
* only a batch scored against itself leaves its own rows out; the original also drops the diagonal when ref_labels is
  the same tensor as labels, that is the positive of every pair;
* a single positive with a single negative counts (the original returns 0);
* CrossBatchMemory saves its pointer and fill, wraps around without losing rows, and reads an indices_tuple of a miner
  as positions in the batch, which they are;
* wrong shapes and a temperature that is not positive raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...losses import common, supcon
from ...ops.common.dtypes import accumulate_dtype
from ...ops.dot_critic import api
from .base import PairLoss, zero_loss
from .cross_batch_memory import CrossBatchMemory
from .pairs import Pairs, listed_log_sum, positive_pairs

__all__ = ["CrossBatchMemory", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

_BLOCK_BYTES = 8 << 20


class NTXentLoss(PairLoss):
    """Mean over the positive pairs (a, p) of -log(e_ap / (e_ap + sum of e_an over the negatives n of a)).

    e = exp(cosine / temperature); an anchor's other positives are in neither sum (Sohn 2016; Chen et al. 2020). 0 with
    a gradient if there is no positive or no negative pair. reducer: None is the mean over the pairs.
    3N FLOP (N = 2 B N' D), and O(P D) for P positive pairs; where P is beyond 8 rows' worth their scores are made again
    in row blocks, 4N more.
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any):
        super().__init__(temperature, **kwargs)

    def _default_reduction(self, losses: Tensor) -> Tensor:
        return losses.mean()

    def _listed(self, scores: Tensor, pairs: Pairs, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        anchor, positive, other, negative = pairs
        if not anchor.numel() or not other.numel():
            return zero_loss(embeddings)
        scores = scores.to(accumulate_dtype(scores.dtype))
        rest = listed_log_sum(scores[other, negative], other, scores.shape[0])
        losses = F.softplus(rest[anchor] - scores[anchor, positive])
        return self._reduce(losses, (anchor, positive), "pos_pair", embeddings, labels)

    def _fused(
        self,
        x: Tensor,
        y: Tensor,
        row_class: Tensor,
        col_class: Tensor,
        own: Tensor | None,
        embeddings: Tensor,
        labels: Tensor,
    ) -> Tensor:
        sizes = torch.bincount(col_class, minlength=int(row_class.max()) + 1)[row_class]
        number = int(sizes.sum()) - (0 if own is None else own.shape[0])
        if number == 0 or bool((sizes == y.shape[0]).all()):
            return zero_loss(embeddings)
        scale = common.inverse_temperature(self.temperature)
        rest = api.statistics(x, y, scale, row_ids=row_class, col_ids=col_class, pairs="unequal_ids").row_lse
        assert rest is not None
        if self.reducer is None and number > 8 * (x.shape[0] + y.shape[0]):
            return _blocked_sum(x, y, scale, rest, row_class, col_class, own) / number
        anchor, positive = positive_pairs(row_class, col_class, own)
        losses = F.softplus(rest[anchor] - (x[anchor] * y[positive]).sum(1) * scale)
        return self._reduce(losses, (anchor, positive), "pos_pair", embeddings, labels)


def _blocked_sum(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    rest: Tensor,
    row_class: Tensor,
    col_class: Tensor,
    own: Tensor | None,
) -> Tensor:
    """Sum of softplus(rest_a - S_ap) over the positive pairs, in row blocks that the backward computes again."""

    def block(x: Tensor, y: Tensor, rest: Tensor, row_class: Tensor, own: Tensor | None) -> Tensor:
        same = row_class[:, None] == col_class
        if own is not None:
            same[torch.arange(x.shape[0], device=x.device), own] = False
        return F.softplus(rest[:, None] - x @ y.mT * scale).masked_fill(~same, 0).sum()

    step = max(1, _BLOCK_BYTES // (x.element_size() * y.shape[0]))
    total = x.new_zeros(())
    for i in range(0, x.shape[0], step):
        rows = slice(i, i + step)
        part = (x[rows], y, rest[rows], row_class[rows], None if own is None else own[rows])
        total = total + checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False)
    return total


class SupConLoss(PairLoss):
    """Per anchor, minus the mean over its positives of log softmax over positives and negatives (Khosla et al. 2020,
    eq. 2), averaged over the anchors whose loss is not 0. reducer: None is that average. 4N FLOP, O((B + N') D)."""

    def __init__(self, temperature: float = 0.1, **kwargs: Any):
        super().__init__(temperature, **kwargs)

    def _default_reduction(self, losses: Tensor) -> Tensor:
        counted = losses > 0
        return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)

    def _listed(self, scores: Tensor, pairs: Pairs, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if not pairs[0].numel() or not pairs[2].numel():
            return zero_loss(embeddings)
        scores = scores.to(accumulate_dtype(scores.dtype))
        positive, negative = (torch.zeros(scores.shape, dtype=torch.bool, device=scores.device) for _ in range(2))
        positive[pairs[0], pairs[1]] = True
        negative[pairs[2], pairs[3]] = True
        if bool((positive & negative).any()):
            raise ValueError("indices_tuple must not name a pair as positive and as negative")
        counts = positive.sum(1)
        log_sum = scores.masked_fill(~(positive | negative), -torch.inf).logsumexp(1)
        mean = torch.where(positive, scores, 0).sum(1) / counts.clamp(min=1)
        losses = torch.where(counts > 0, log_sum - mean, 0)
        everyone = torch.arange(scores.shape[0], device=scores.device)
        return self._reduce(losses, everyone, "element", embeddings, labels)

    def _fused(
        self,
        x: Tensor,
        y: Tensor,
        row_class: Tensor,
        col_class: Tensor,
        own: Tensor | None,
        embeddings: Tensor,
        labels: Tensor,
    ) -> Tensor:
        sizes = torch.bincount(col_class, minlength=int(row_class.max()) + 1)[row_class]
        others = sizes - (0 if own is None else 1)
        negatives = y.shape[0] - sizes
        if not bool((others > 0).any() and (negatives > 0).any()):
            return zero_loss(embeddings)
        scale = common.inverse_temperature(self.temperature)
        losses, _ = supcon.class_rows(x, y, row_class, col_class, own=own, scale=scale)
        # Rounding must not make a loss of a softmax over one candidate positive: the average would count it.
        losses = torch.where((others == 1) & (negatives == 0), 0, losses)
        everyone = torch.arange(x.shape[0], device=x.device)
        return self._reduce(losses, everyone, "element", embeddings, labels)


class SelfSupervisedLoss(nn.Module):
    """loss over (embeddings [B, D], ref_emb [B, D]) whose row i is a positive pair; symmetric: over all 2B views."""

    def __init__(self, loss: Callable[..., Tensor], symmetric: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.loss = loss
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        common.check_same_shape("embeddings", embeddings, "ref_emb", ref_emb)
        labels = torch.arange(embeddings.shape[0], device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat([embeddings, ref_emb]), labels.repeat(2))
        return self.loss(embeddings=embeddings, labels=labels, ref_emb=ref_emb, ref_labels=labels.clone())
