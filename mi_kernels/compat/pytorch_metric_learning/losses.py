"""NTXentLoss, SupConLoss, SelfSupervisedLoss and CrossBatchMemory of pytorch-metric-learning (2.8, 2.9).

With labels and a cosine or dot-product distance no B x N tensor is stored. (The original stores positive pairs x
negative pairs numbers, 1.2 GB for 512 embeddings.) With an indices_tuple scores are computed in blocks of rows. Any
other distance, including subclasses of those two that override how scores are computed, provides its B x N matrix.
Reducers, distances, regularizers and miners of the original can be used. If the original is installed, these classes
are subclasses of its losses with its default distance and reducers, so its wrappers accept them. Differences:
* 16-bit embeddings give an fp32 loss. The original's log(x + tiny) limits a half-precision loss to about 9.7 and stops
  its
  gradient.
* A batch that is scored against itself excludes each row's score with itself. This applies if ref_emb is not given or
  is the
  tensor embeddings. The original tests whether ref_labels is the tensor labels. With another ref_emb it then drops the
  positive of every pair, and with ref_emb=embeddings and copied labels it counts every row as its own positive.
* A single positive with a single negative counts. The original returns 0.
* SupConLoss averages over all anchors with a positive and another candidate, whose loss is above 0 in exact arithmetic.
  The
  original averages over losses that are above 0 after rounding.
* CrossBatchMemory saves its pointer and fill, wraps around without losing rows, and interprets a miner's indices_tuple
  as
  positions in the batch.
* CrossBatchMemory and SelfSupervisedLoss refuse those losses of the original that the original does not support with
  them, and
  accept any other callable.
* A NaN or infinite embedding gives NaN. The original's SupConLoss leaves the anchors whose loss is NaN out of the mean.
* Wrong shapes and temperatures that are not positive raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...losses import common
from . import dense, large, original
from .base import Lists, PairLoss, Scores, already_reduced, sub_loss
from .cross_batch_memory import CrossBatchMemory
from .pairs import Pairs, pair_scores, positive_pairs
from .support import SELF_SUPERVISED, check_support, refuse

__all__ = ["CrossBatchMemory", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

# Up to so many scores storing them is quicker than a kernel that does not.
_SMALL = {"NTXentLoss": 1 << 12, "SupConLoss": 1 << 11}


def _stored(scores: Scores, labels: Tensor, own: Tensor | None, loss: str) -> bool:
    """Whether the loss is computed from stored scores: the matrix of a distance, or few scores, except those of two
    concatenated views, for which there is a kernel."""
    if scores.features is None:
        return True
    half = labels.shape[0] // 2
    two_views = own is not None and torch.equal(labels[:half], labels[half:])
    return scores.shape[0] * scores.shape[1] <= _SMALL[loss] and not two_views


class NTXentLoss(PairLoss):
    """Mean over the positive pairs (a, p) of -log(e_ap / (e_ap + sum of e_an over the negatives n of a)), in nats.

    e = exp(cosine / temperature). The other positives of an anchor are in neither term (Sohn 2016; Chen et al. 2020).
    The loss is 0, with a gradient, if there is no positive or no negative pair. reducer=None is the mean over the
    pairs.

    Cost, with N = 2 B N' D FLOP for N' candidates: 3N if positives form a one-to-one mapping, otherwise 4N; O((B + N')
    D + P) memory for P positive pairs. If P exceeds the number of scores in 8 rows, positive scores are recomputed in
    blocks of rows, which costs 4N more.
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any):
        super().__init__(temperature, **kwargs)

    def _of_pairs(self, scores: Scores, pairs: Pairs) -> dict[str, dict[str, Any]]:
        positive, negative = Lists.of(*pairs[:2]), Lists.of(*pairs[2:])

        def block(s: Tensor, first: int) -> Tensor:
            rest = dense.weighted_log_sum(s, *negative.within(first, s.shape[0]))
            return dense.nt_xent_pairs(s, rest, *positive.within(first, s.shape[0]))

        losses = positive.as_given(torch.cat(list(scores.over_blocks(block))))
        if self._reduces_itself():
            return already_reduced(losses.mean())
        return sub_loss(losses, pairs[:2], "pos_pair")

    def _labelled(
        self, scores: Scores, labels: Tensor, ref_labels: Tensor, own: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        if _stored(scores, labels, own, "NTXentLoss"):
            s = scores.whole()
            positive, negative = dense.label_masks(labels, ref_labels, own)
            number = int(positive.sum())
            if not number or not bool(negative.any()):
                return self.zero_losses()
            rest = dense.log_sum(s, negative)
            if self._reduces_itself():
                return already_reduced(dense.nt_xent_sum(s, rest, positive) / number)
            pairs = torch.where(positive)
            return sub_loss(dense.nt_xent_pairs(s, rest, *pairs), pairs, "pos_pair")
        assert scores.features is not None
        x, y = scores.features
        classes = large.Classes.of(labels, ref_labels, own)
        number = int(classes.positives.sum())
        if not number or not bool((classes.negatives > 0).any()):
            return self.zero_losses()
        plain = self._reduces_itself()
        if plain:
            mean = large.twins_mean(x, y, scores.scale, classes)
            if mean is not None:
                return already_reduced(mean)
        rest = large.negatives_log_sum(x, y, scores.scale, classes.row, classes.column)
        if plain and number > 8 * (x.shape[0] + y.shape[0]):
            return already_reduced(_blocked_sum(scores, rest, classes) / number)
        pairs = positive_pairs(classes.row, classes.column, own)
        losses = dense.softplus(rest[pairs[0]] - pair_scores(x, y, *pairs) * scores.scale)
        return already_reduced(losses.mean()) if plain else sub_loss(losses, pairs, "pos_pair")


def _blocked_sum(scores: Scores, rest: Tensor, classes: large.Classes) -> Tensor:
    """Sum of log(1 + exp(rest_a - S_ap)) over the positive pairs, in blocks of rows."""

    def block(s: Tensor, first: int, rest: Tensor) -> Tensor:
        rows = slice(first, first + s.shape[0])
        own = None if classes.own is None else classes.own[rows]
        return dense.nt_xent_sum(s, rest, dense.label_masks(classes.row[rows], classes.column, own)[0])

    return torch.stack(list(scores.over_blocks(block, rest))).sum()


class SupConLoss(PairLoss):
    """For each anchor, the negative mean over its positives of the log softmax over positives and negatives (Khosla et
    al. 2020, eq. 2), in nats. reducer=None averages over the anchors that have a positive and another candidate. Cost:
    4N FLOP, 3N if all anchors have one positive or all have several; O((B + N') D) memory."""

    own_reducer = original.AvgNonZeroReducer

    def __init__(self, temperature: float = 0.1, **kwargs: Any):
        super().__init__(temperature, **kwargs)

    def _of_pairs(self, scores: Scores, pairs: Pairs) -> dict[str, dict[str, Any]]:
        positive, negative = Lists.of(*pairs[:2]), Lists.of(*pairs[2:])

        def block(s: Tensor, first: int) -> Tensor:
            p, n = (dense.listed_mask(s, *pairs.within(first, s.shape[0])) for pairs in (positive, negative))
            if bool((p & n).any()):
                raise ValueError("indices_tuple must not name a pair as positive and as negative")
            return torch.stack([dense.sup_con_rows(s, p, n), _counted(p.sum(1), n.sum(1)).to(s.dtype)])

        losses, counted = torch.cat(list(scores.over_blocks(block)), 1)
        return self._rows(losses, counted)

    def _labelled(
        self, scores: Scores, labels: Tensor, ref_labels: Tensor, own: Tensor | None
    ) -> dict[str, dict[str, Any]]:
        if _stored(scores, labels, own, "SupConLoss"):
            positive, negative = dense.label_masks(labels, ref_labels, own)
            positives, negatives = positive.sum(1), negative.sum(1)
            if not bool(positives.any()) or not bool(negatives.any()):
                return self.zero_losses()
            losses = dense.sup_con_rows(scores.whole(), positive, negative)
            return self._rows(losses, _counted(positives, negatives))
        assert scores.features is not None
        x, y = scores.features
        classes = large.Classes.of(labels, ref_labels, own)
        if not bool((classes.positives > 0).any()) or not bool((classes.negatives > 0).any()):
            return self.zero_losses()
        if self._reduces_itself():
            mean = large.twins_mean(x, y, scores.scale, classes)
            mean = large.class_mean(x, y, scores.scale, classes) if mean is None else mean
            if mean is not None:
                return already_reduced(mean)
        losses = large.sup_con_rows(x, y, scores.scale, classes)
        return self._rows(losses, _counted(classes.positives, classes.negatives))

    def _rows(self, losses: Tensor, counted: Tensor) -> dict[str, dict[str, Any]]:
        if self._reduces_itself():
            return already_reduced(losses.sum() / counted.sum().clamp(min=1))
        return sub_loss(losses, torch.arange(losses.shape[0], device=losses.device), "element")


def _counted(positives: Tensor, negatives: Tensor) -> Tensor:
    """The anchors whose loss is above 0 in exact arithmetic."""
    return (positives > 0) & (positives + negatives > 1)


class SelfSupervisedLoss(nn.Module):
    """Applies `loss` to embeddings [B, D] and ref_emb [B, D]; row i of both is a positive pair. symmetric uses all 2B
    views as anchors."""

    def __init__(self, loss: Callable[..., Tensor], symmetric: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        check_support(type(self), loss)
        self.loss = loss
        self.symmetric = symmetric

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the original's losses that may be wrapped."""
        return list(SELF_SUPERVISED)

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Raises ValueError for a name that is not among supported_losses()."""
        refuse(cls, loss_name)

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        common.check_same_shape("embeddings", embeddings, "ref_emb", ref_emb)
        labels = torch.arange(embeddings.shape[0], device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat([embeddings, ref_emb]), labels.repeat(2))
        return self.loss(embeddings=embeddings, labels=labels, ref_emb=ref_emb, ref_labels=labels.clone())
