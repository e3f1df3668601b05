"""Replaces `pytorch_metric_learning.utils.distributed`: losses and miners over the embeddings of all ranks.

As in the original, gathered embeddings start with this rank's rows, followed by those of the other ranks without a
gradient, and miners' indices refer to that order. Ranks may hold different numbers of rows, which the original does not
support. A CrossBatchMemory receives the rows in the order of the ranks, so that all ranks keep the same memory. In the
original the memories of the ranks differ once they wrap around.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .... import distributed
from ....distributed.exchange import Ranks, gather_rows, meet
from ..base import PairLoss, check_inputs
from ..cross_batch_memory import CrossBatchMemory
from ..pairs import all_pairs, without

__all__ = [
    "DistributedLossWrapper",
    "DistributedMinerWrapper",
    "all_gather",
    "all_gather_embeddings_and_labels",
    "gather",
    "gather_emb_and_ref",
    "gather_enqueue_mask",
    "get_indices_tuple",
    "is_distributed",
    "select_ref_or_regular",
]


def is_distributed() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _uniform(labels: Tensor, device: torch.device) -> Tensor:
    """Converts labels to a dtype that is the same on all ranks."""
    return labels.to(device, torch.float64 if labels.is_floating_point() else torch.long)


def _others(t: Tensor, ranks: Ranks) -> Tensor:
    """The rows of the other ranks, in their order, without a gradient."""
    every = gather_rows(t.detach(), ranks)
    return torch.cat([every[: ranks.first], every[ranks.first + t.shape[0] :]])


def all_gather(x: Tensor) -> Tensor | None:
    """The rows [B, ...] of the other ranks, in their order, without a gradient; None where there are none."""
    if distributed.rank_and_size()[1] == 1:
        return None
    return _others(x, meet(x, name="x"))


def all_gather_embeddings_and_labels(emb: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`all_gather` of both; None, None where there are no other ranks."""
    if distributed.rank_and_size()[1] == 1:
        return None, None
    ranks = meet(emb, name="emb")
    return _others(emb, ranks), None if labels is None else _others(_uniform(labels, emb.device), ranks)


def gather(emb: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """emb [B, D] and labels [B] followed by those of the other ranks, and the labels themselves."""
    check_inputs("emb", emb, "labels", labels)
    labels = None if labels is None else _uniform(labels, emb.device)
    others, other_labels = all_gather_embeddings_and_labels(emb, labels)
    if others is None:
        return emb, labels, labels
    all_labels = None if labels is None or other_labels is None else torch.cat([labels, other_labels])
    return torch.cat([emb, others]), all_labels, labels


def gather_emb_and_ref(
    emb: Tensor, labels: Tensor | None, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`gather` of the batch and of a reference batch: all_emb, all_labels, all_ref_emb, all_ref_labels, labels."""
    all_emb, all_labels, labels = gather(emb, labels)
    if ref_emb is None:
        return all_emb, all_labels, None, None, labels
    all_ref_emb, all_ref_labels, _ = gather(ref_emb, ref_labels)
    return all_emb, all_labels, all_ref_emb, all_ref_labels, labels


def gather_enqueue_mask(enqueue_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """An enqueue mask [B] followed by those of the other ranks."""
    if enqueue_mask is None:
        return None
    enqueue_mask = enqueue_mask.to(device)
    others = all_gather(enqueue_mask)
    return enqueue_mask if others is None else torch.cat([enqueue_mask, others])


def select_ref_or_regular(regular: Tensor | None, ref: Tensor | None) -> Tensor | None:
    """Returns ref if it is given, otherwise regular."""
    return regular if ref is None else ref


def get_indices_tuple(
    labels: Tensor,
    ref_labels: Tensor,
    embeddings: Tensor | None = None,
    ref_emb: Tensor | None = None,
    miner: Callable[..., tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """Pairs or triplets of this rank's rows against candidates that start with these rows."""
    found = all_pairs(labels, ref_labels, None) if miner is None else miner(embeddings, labels, ref_emb, ref_labels)
    return without(found, torch.arange(labels.shape[0], device=labels.device))


class DistributedLossWrapper(nn.Module):
    """The loss over the embeddings and labels of all ranks, times the number of ranks.

    After DistributedDataParallel has averaged the gradients, they equal those of one process that holds all rows. With
    efficient=True each rank scores only its own anchors, which is 1/W of the work, but the gradients differ, as in the
    original. (mk.distributed.sup_con and nt_xent have this lower cost and the correct gradients.) Without a process
    group the plain loss is computed, with a warning. indices_tuple must come from a DistributedMinerWrapper with the
    same `efficient`.
    """

    def __init__(self, loss: Callable[..., Tensor], efficient: bool = False):
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be callable, got {type(loss).__name__}")
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
            if not is_distributed():
                warnings.warn("there is no process group: the loss is that of this process alone", stacklevel=2)
            if memory:
                return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
            return self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if memory:
            if labels is None:
                raise ValueError("labels must be given: the memory keeps them")
            return size * self._with_memory(embeddings, labels, indices_tuple, enqueue_mask)
        if ref_emb is embeddings:
            ref_emb, ref_labels = None, None
        all_emb, all_labels, all_ref, all_ref_labels, labels = gather_emb_and_ref(
            embeddings, labels, ref_emb, ref_labels
        )
        if not self.efficient:
            return size * self.loss(all_emb, all_labels, indices_tuple, all_ref, all_ref_labels)
        candidates, classes = (all_emb, all_labels) if all_ref is None else (all_ref, all_ref_labels)
        return size * self._own_anchors(embeddings, labels, indices_tuple, candidates, classes)

    def _own_anchors(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        candidates: Tensor,
        classes: Tensor | None,
    ) -> Tensor:
        """As in the original, row i is no candidate of anchor i, also where the candidates are a reference batch."""
        if indices_tuple is None:
            if labels is None or classes is None:
                raise ValueError("labels (and ref_labels with ref_emb) or indices_tuple must be given")
            if isinstance(self.loss, PairLoss) and candidates.shape[0] >= embeddings.shape[0]:
                own = torch.arange(embeddings.shape[0], device=embeddings.device)
                return self.loss.against(embeddings, labels, candidates, classes, own)
            indices_tuple = get_indices_tuple(labels, classes)
        return self.loss(embeddings, labels, indices_tuple, candidates, classes)

    def _with_memory(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        enqueue_mask: Tensor | None,
    ) -> Tensor:
        check_inputs("embeddings", embeddings, "labels", labels)
        ranks = meet(embeddings, name="embeddings")

        def in_order(t: Tensor) -> Tensor:
            every = gather_rows(t.detach(), ranks)
            return torch.cat([every[: ranks.first], t, every[ranks.first + t.shape[0] :]])

        if indices_tuple is not None:
            indices_tuple = tuple(_in_rank_order(t.to(embeddings.device), ranks) for t in indices_tuple)
        mask = None if enqueue_mask is None else in_order(enqueue_mask.to(embeddings.device))
        return self.loss(in_order(embeddings), in_order(_uniform(labels, embeddings.device)), indices_tuple, mask)


def _in_rank_order(indices: Tensor, ranks: Ranks) -> Tensor:
    """Converts positions among rows with this rank's rows first to positions among rows in the order of the ranks."""
    rows = ranks.sizes[ranks.rank]
    before = torch.where(indices < rows + ranks.first, indices - rows, indices)
    return torch.where(indices < rows, indices + ranks.first, before)


class DistributedMinerWrapper(nn.Module):
    """Applies `miner` to the embeddings and labels of all ranks; indices count this rank's rows first. With
    efficient=True only this rank's rows are anchors."""

    def __init__(self, miner: Callable[..., tuple[Tensor, ...]], efficient: bool = False):
        super().__init__()
        if not callable(miner):
            raise TypeError(f"miner must be callable, got {type(miner).__name__}")
        self.miner = miner
        self.efficient = efficient

    def forward(
        self, emb: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """emb [B, D], labels [B] and a reference batch of this rank -> triplets or pairs."""
        if distributed.rank_and_size()[1] == 1:
            return self.miner(emb, labels, ref_emb, ref_labels)
        all_emb, all_labels, all_ref, all_ref_labels, own = gather_emb_and_ref(emb, labels, ref_emb, ref_labels)
        if not self.efficient:
            return self.miner(all_emb, all_labels, all_ref, all_ref_labels)
        assert own is not None
        classes = select_ref_or_regular(all_labels, all_ref_labels)
        assert classes is not None
        return get_indices_tuple(own, classes, emb, select_ref_or_regular(all_emb, all_ref), self.miner)
