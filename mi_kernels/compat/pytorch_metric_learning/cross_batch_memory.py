"""Embeddings and labels of earlier batches as further pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...memory_bank import ring_slots
from .base import PairLoss, check_inputs
from .pairs import all_pairs, as_pairs


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
        check_inputs("embeddings", embeddings, "labels", labels)
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
        if isinstance(self.loss, PairLoss) and self.miner is None and indices_tuple is None:
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
                kept = 3 if len(found) == 3 else 2
                found = (*(t[keep] for t in found[:kept]), *found[kept:])
        if given is None:
            return found
        assert own is not None
        anchor, positive, other, negative = as_pairs(given)
        return (
            *(
                torch.cat([a, b.to(a)])
                for a, b in zip(as_pairs(found), (anchor, own[positive], other, own[negative]), strict=True)
            ),
        )

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
