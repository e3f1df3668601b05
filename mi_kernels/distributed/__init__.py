"""The contrastive losses with negatives from every rank.

Each rank holds B pairs and scores its own anchors against the candidates of all W ranks: B x WB scores per rank, which
are never stored. Features are communicated, scores are not. Ranks may hold different numbers of rows, including zero.
Shapes are exchanged once per loss; if dtypes or widths differ, every rank raises the same ValueError.

The value on a rank is W / N times the sum over its anchors, where N is the number of anchors on all ranks. If all ranks
hold the same number, this is the mean over its anchors. The mean of the values over the ranks equals the loss of one
process that holds all pairs. The same is true of every gradient, including that of the temperature, after
DistributedDataParallel has averaged the gradients. For this, gradients flow back to the ranks that own the features;
libraries that block this flow optimise a different objective.

There are two schedules with equal values and gradients:
* "gather" (default): every rank holds the features of all ranks, O(W B D). One collective in forward and one in
  backward; twice
  differentiable.
* "ring": features travel from rank to rank, and each transfer overlaps with the computation on the features at hand;
  O(B D)
  memory for any W. Once differentiable; the gradient of a scale is correct after averaging over the ranks.

All ranks must call the loss with the same options, in forward and in backward. Without an initialised process group
these are the plain losses.
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
