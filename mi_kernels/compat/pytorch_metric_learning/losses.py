"""NTXentLoss, SupConLoss, SelfSupervisedLoss and CrossBatchMemory of pytorch-metric-learning (2.8, 2.9).

With labels and a cosine or dot-product distance nothing B x N is stored: the original keeps positive pairs x negative
pairs numbers (1.2 GB for 512 embeddings). With an indices_tuple, or another distance, the B x N scores are stored, never
pairs x pairs. Reducers, distances, regularizers and miners of the original plug in. Differences:
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

from ... import functional, positives
from ...memory_bank import ring_slots
from ...ops.dot_critic import api
from ...ops.dot_critic.primitives import accumulate_dtype
from .pairs import Pairs, all_pairs, as_pairs, listed_log_sum, positive_pairs

__all__ = ["CrossBatchMemory", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

_BLOCK_BYTES = 8 << 20


def _check(name: str, embeddings: Tensor, label_name: str, labels: Tensor | None) -> None:
    if embeddings.dim() != 2 or not embeddings.shape[0]:
        raise ValueError(f"{name} must have shape [batch, features] with batch >= 1, got {tuple(embeddings.shape)}")
    if labels is not None and labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{label_name} must have shape {tuple(embeddings.shape[:1])}, got {tuple(labels.shape)}")


class _PairLoss(nn.Module):
    """What both losses share: the inputs' checks, which path runs, and the reduction."""

    def __init__(
        self,
        temperature: float,
        collect_stats: bool | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1,
        reducer: Callable[..., Tensor] | None = None,
        distance: nn.Module | None = None,
    ):
        super().__init__()
        self.temperature = temperature
        self.collect_stats = bool(collect_stats)
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.reducer = reducer
        self.distance = distance

    def _features(self, *embeddings: Tensor) -> list[Tensor] | None:
        """What the scores are inner products of; None for a distance that is no inner product."""
        if self.distance is None:
            return [F.normalize(e.to(accumulate_dtype(e.dtype)), dim=1) for e in embeddings]
        kind = {base.__name__ for base in type(self.distance).__mro__}
        if "DotProductSimilarity" not in kind or getattr(self.distance, "power", 1) != 1:
            return None
        if not self.distance.normalize_embeddings:
            return [e.to(accumulate_dtype(e.dtype)) for e in embeddings]
        return [F.normalize(e.to(accumulate_dtype(e.dtype)), p=float(self.distance.p), dim=1) for e in embeddings]

    def _matrix(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Scores / temperature, [B, N]."""
        features = self._features(embeddings, ref_emb)
        scale = functional._temperature(self.temperature)
        if features is not None:
            return features[0] @ features[1].mT * scale
        assert self.distance is not None
        scores = self.distance(embeddings, ref_emb)
        return (scores if self.distance.is_inverted else -scores) * scale

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, D], labels [B]; ref_emb [N, D], ref_labels [N] (default: the batch itself without the
        diagonal); indices_tuple of triplets (anchor, positive, negative) or pairs replaces the labels' pairs."""
        _check("embeddings", embeddings, "labels", labels)
        own = None
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
            own = torch.arange(embeddings.shape[0], device=embeddings.device)
        _check("ref_emb", ref_emb, "ref_labels", ref_labels)
        if indices_tuple is None and (labels is None or ref_labels is None):
            raise ValueError("labels (and ref_labels with ref_emb) or indices_tuple must be given")
        if indices_tuple is None:
            assert labels is not None and ref_labels is not None
            device = embeddings.device
            return self.against(embeddings, labels.to(device), ref_emb, ref_labels.to(device), own)
        loss = self._listed(self._matrix(embeddings, ref_emb), as_pairs(indices_tuple), embeddings, labels)
        return self._regularized(loss, embeddings)

    def against(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, own: Tensor | None
    ) -> Tensor:
        """The loss from labels; own [B] is the column of ref_emb that is the row itself, None if there is none."""
        features = self._features(embeddings, ref_emb)
        if features is None:
            pairs = all_pairs(labels, ref_labels, own)
            loss = self._listed(self._matrix(embeddings, ref_emb), pairs, embeddings, labels)
        else:
            classes = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)[1].split(
                [labels.shape[0], ref_labels.shape[0]]
            )
            loss = self._fused(features[0], features[1], classes[0], classes[1], own, embeddings, labels)
        return self._regularized(loss, embeddings)

    def _regularized(self, loss: Tensor, embeddings: Tensor) -> Tensor:
        if self.embedding_regularizer is None:
            return loss
        return loss + self.embedding_reg_weight * self.embedding_regularizer(embeddings)

    def _reduce(self, losses: Tensor, indices: Any, kind: str, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if self.reducer is not None:
            found = {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}
            return self.reducer(found, embeddings, labels)
        return self._default_reduction(losses)

    def _default_reduction(self, losses: Tensor) -> Tensor:
        raise NotImplementedError

    def _listed(self, scores: Tensor, pairs: Pairs, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

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
        raise NotImplementedError


def _zero(embeddings: Tensor) -> Tensor:
    return (embeddings.to(accumulate_dtype(embeddings.dtype)) * 0).sum()


class NTXentLoss(_PairLoss):
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
            return _zero(embeddings)
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
            return _zero(embeddings)
        scale = functional._temperature(self.temperature)
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
    """Sum of softplus(rest_a - S_ap) over the positive pairs, in row blocks that are computed again for the backward."""

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


class SupConLoss(_PairLoss):
    """Per anchor, minus the mean over its positives of log softmax over positives and negatives (Khosla et al. 2020,
    eq. 2), averaged over the anchors whose loss is not 0. reducer: None is that average. 4N FLOP, O((B + N') D)."""

    def __init__(self, temperature: float = 0.1, **kwargs: Any):
        super().__init__(temperature, **kwargs)

    def _default_reduction(self, losses: Tensor) -> Tensor:
        counted = losses > 0
        return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)

    def _listed(self, scores: Tensor, pairs: Pairs, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if not pairs[0].numel() or not pairs[2].numel():
            return _zero(embeddings)
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
            return _zero(embeddings)
        scale = functional._temperature(self.temperature)
        losses, _ = positives.class_rows(x, y, row_class, col_class, own=own, scale=scale)
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
        functional._same_shape("embeddings", embeddings, "ref_emb", ref_emb)
        labels = torch.arange(embeddings.shape[0], device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat([embeddings, ref_emb]), labels.repeat(2))
        return self.loss(embeddings=embeddings, labels=labels, ref_emb=ref_emb, ref_labels=labels.clone())


class CrossBatchMemory(nn.Module):
    """loss of the batch against the last memory_size embeddings and labels, the batch's own among them (Wang et al.
    2020, XBM). State: embedding_memory, label_memory, queue_idx, has_been_filled.

    enqueue_mask [B]: only these are stored, only the others are anchors. indices_tuple, of a miner run on the batch, is
    added to the memory's pairs. With a loss of this module, no miner and no indices_tuple, nothing B x M is stored; any
    other loss(embeddings, labels, indices_tuple, ref_emb, ref_labels) gets the list of all pairs. A state without
    queue_idx, as the original saves it, continues after its last row that is not 0.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: Tensor
    has_been_filled: Tensor

    def __init__(
        self,
        loss: Callable[..., Tensor],
        embedding_size: int,
        memory_size: int = 1024,
        miner: Callable[..., tuple[Tensor, ...]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        for name, value in (("embedding_size", embedding_size), ("memory_size", memory_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.loss = loss
        self.miner = miner
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        """Forgets everything."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.long))
        self.register_buffer("queue_idx", torch.zeros((), dtype=torch.long))
        self.register_buffer("has_been_filled", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Stores batch_size rows over the oldest; curr_batch_idx [batch_size] says where (-1: not kept)."""
        start = int(self.queue_idx)
        dropped, runs, pointer = ring_slots(start, batch_size, self.memory_size)
        # New tensors: the loss of the batch before may still hold the old ones for its backward.
        self.embedding_memory, self.label_memory = self.embedding_memory.clone(), self.label_memory.clone()
        for slot, row, length in runs:
            self.embedding_memory[slot : slot + length] = embeddings[row : row + length]
            self.label_memory[slot : slot + length] = labels[row : row + length]
        rows = torch.arange(batch_size, device=labels.device)
        self.curr_batch_idx = torch.where(rows < dropped, -1, (start + rows) % self.memory_size)
        self.has_been_filled.fill_(bool(self.has_been_filled) or start + batch_size >= self.memory_size)
        self.queue_idx.fill_(pointer)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, D], labels [B] -> loss. Raises ValueError naming the argument."""
        if indices_tuple is not None and enqueue_mask is not None:
            raise ValueError("indices_tuple and enqueue_mask cannot both be given")
        _check("embeddings", embeddings, "labels", labels)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must have {self.embedding_size} features, got {tuple(embeddings.shape)}")
        device = embeddings.device
        labels = labels.to(device)
        self.embedding_memory = self.embedding_memory.to(device, embeddings.dtype)
        self.label_memory = self.label_memory.to(device, labels.dtype)
        if enqueue_mask is None:
            if embeddings.shape[0] > self.memory_size:
                raise ValueError(f"embeddings must hold at most memory_size={self.memory_size}, got {len(embeddings)}")
            self.add_to_memory(embeddings, labels, embeddings.shape[0])
            own = self.curr_batch_idx
        else:
            if enqueue_mask.shape != labels.shape or enqueue_mask.dtype != torch.bool:
                raise ValueError(f"enqueue_mask must be bool of shape {tuple(labels.shape)}, got {enqueue_mask!r}")
            self.add_to_memory(embeddings[enqueue_mask], labels[enqueue_mask], int(enqueue_mask.sum()))
            embeddings, labels, own = embeddings[~enqueue_mask], labels[~enqueue_mask], None
        fill = self.memory_size if self.has_been_filled else int(self.queue_idx)
        memory, memory_labels = self.embedding_memory[:fill], self.label_memory[:fill]
        if isinstance(self.loss, _PairLoss) and self.miner is None and indices_tuple is None:
            return self.loss.against(embeddings, labels, memory, memory_labels, own)
        pairs = self._indices(embeddings, labels, memory, memory_labels, indices_tuple, own)
        return self.loss(embeddings, labels, pairs, memory, memory_labels)

    def _indices(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory: Tensor,
        memory_labels: Tensor,
        given: tuple[Tensor, ...] | None,
        own: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if self.miner is None:
            found: tuple[Tensor, ...] = all_pairs(labels, memory_labels, own)
        else:
            found = self.miner(embeddings, labels, memory, memory_labels)
            if own is not None:
                keep = own[found[0]] != found[1]
                found = (*(t[keep] for t in found),) if len(found) == 3 else (found[0][keep], found[1][keep], *found[2:])
        if given is None:
            return found
        assert own is not None
        anchor, positive, other, negative = as_pairs(given)
        return *(
            torch.cat([a, b.to(a)])
            for a, b in zip(as_pairs(found), (anchor, own[positive], other, own[negative]), strict=True)
        ),

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, found, *rest)
        added = {prefix + "queue_idx", prefix + "has_been_filled"}
        if added <= set(found) and prefix + "embedding_memory" in state_dict:
            used = self.embedding_memory.ne(0).any(1).nonzero()
            fill = int(used[-1]) + 1 if used.numel() else 0
            self.queue_idx.fill_(fill % self.memory_size)
            self.has_been_filled.fill_(fill == self.memory_size)
            found = [name for name in found if name not in added]
        missing.extend(found)
