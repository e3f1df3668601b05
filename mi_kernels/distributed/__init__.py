"""The contrastive losses with negatives from every rank.

Each rank holds B pairs and scores its own anchors against the candidates of all W ranks: B x WB scores per rank, never
stored. Features travel, scores do not. Ranks may hold different numbers of rows, none included: shapes are exchanged
once per loss, and where dtype or width differ every rank raises the same ValueError.

The value is W / N times the sum over this rank's anchors, N anchors on all ranks (the mean over its anchors where all
ranks hold as many). Its mean over the ranks is the loss of one process that holds all pairs, and so is, after
DistributedDataParallel's averaging, every gradient, the temperature's included. That needs gradients to travel back to
the owners of the features; libraries that stop them train on another objective.

Two schedules have one value and one gradient:
* "gather" (default): every rank holds the features of all ranks, O(W B D). One collective each way; differentiable
  twice.
* "ring": features are passed around, each transfer while the rank computes with what it has; O(B D) memory whatever W
  is. Differentiable once; the gradient with respect to a scale is right in the mean over the ranks.

Every rank must call with the same options, forward and backward. Without an initialised process group these are the
plain losses.
"""

from .exchange import gather, rank_and_size
from .losses import clip_loss, cross_entropy_rows, info_nce, nt_xent, nt_xent_scaled, siglip_loss
from .supcon import sup_con

__all__ = [
    "clip_loss",
    "cross_entropy_rows",
    "gather",
    "info_nce",
    "nt_xent",
    "nt_xent_scaled",
    "rank_and_size",
    "siglip_loss",
    "sup_con",
]
