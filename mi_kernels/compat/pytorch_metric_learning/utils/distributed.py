"""Replaces `pytorch_metric_learning.utils.distributed`: `DistributedLossWrapper`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .... import distributed
from ..base import PairLoss
from ..cross_batch_memory import CrossBatchMemory
from ..pairs import all_pairs

__all__ = ["DistributedLossWrapper"]


def _own_first(t: Tensor) -> Tensor:
    """This rank's rows, then those of the other ranks without a gradient: [B, ...] -> [W B, ...]."""
    first = distributed.rank_and_size()[0] * t.shape[0]
    every = distributed.gather(t.detach())
    return torch.cat([t, every[:first], every[first + t.shape[0] :]])


class DistributedLossWrapper(nn.Module):
    """loss over the embeddings and labels of all ranks, times the number of ranks.

    After DistributedDataParallel's average the gradients are those of one process that holds everything. efficient
    scores this rank's anchors only, at 1/W of the work, and has other gradients, as in the original;
    mk.distributed.sup_con and nt_xent have the work of the second and the gradients of the first. Without a process
    group the loss alone, with a warning. Every rank needs the same shapes.
    """

    def __init__(self, loss: Callable[..., Tensor], efficient: bool = False):
        super().__init__()
        if efficient and isinstance(loss, CrossBatchMemory):
            raise ValueError("efficient must be False with a CrossBatchMemory")
        self.loss = loss
        self.efficient = efficient

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        memory = isinstance(self.loss, CrossBatchMemory)
        if memory and (ref_emb is not None or ref_labels is not None):
            raise ValueError("ref_emb and ref_labels cannot be given with a CrossBatchMemory")
        size = distributed.rank_and_size()[1]
        if size == 1:
            if not torch.distributed.is_initialized():
                warnings.warn("there is no process group: the loss is that of this process", stacklevel=2)
            if memory:
                return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
            return self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        labels, ref_labels = (None if t is None else t.to(embeddings.device) for t in (labels, ref_labels))
        everyone = [
            None if t is None else _own_first(t) for t in (embeddings, labels, ref_emb, ref_labels, enqueue_mask)
        ]
        if memory:
            return size * self.loss(everyone[0], everyone[1], indices_tuple, everyone[4])
        if not self.efficient:
            return size * self.loss(everyone[0], everyone[1], indices_tuple, everyone[2], everyone[3])
        return size * self._own_anchors(embeddings, labels, indices_tuple, everyone)

    def _own_anchors(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        everyone: list[Tensor | None],
    ) -> Tensor:
        own = torch.arange(embeddings.shape[0], device=embeddings.device) if everyone[2] is None else None
        candidates, classes = (everyone[0], everyone[1]) if own is not None else (everyone[2], everyone[3])
        if indices_tuple is None:
            if labels is None or candidates is None or classes is None:
                raise ValueError("labels (and ref_labels with ref_emb) or indices_tuple must be given")
            if isinstance(self.loss, PairLoss):
                return self.loss.against(embeddings, labels, candidates, classes, own)
            indices_tuple = all_pairs(labels, classes, own)
        return self.loss(embeddings, labels, indices_tuple, candidates, classes)
