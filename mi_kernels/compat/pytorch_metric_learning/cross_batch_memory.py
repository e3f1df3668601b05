"""Cross-batch memory: embeddings and labels of earlier batches as additional pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...memory_bank import ring_slots
from . import original
from .base import PairLoss, check_inputs
from .pairs import all_pairs, candidates_at, joined, without
from .support import CROSS_BATCH, check_support, refuse


class CrossBatchMemory(original.CrossBatchMemory):
    """The loss of the batch against the last memory_size embeddings and labels, including those of the batch (XBM, Wang
    et al. 2020).

    State: embedding_memory, label_memory, queue_idx (the position of the next row) and has_been_filled. enqueue_mask
    [B] selects rows that are stored but are not anchors; the others are anchors but are not stored. indices_tuple, from
    a miner on the batch, is added to the pairs with the memory. With a loss of this package, no miner and no
    indices_tuple, no B x M tensor is stored. Any other loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    receives the list of all pairs. A state of the original, which has no queue_idx, continues after its last nonzero
    row.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    curr_batch_idx: Tensor
    queue_idx: int
    has_been_filled: bool

    def __init__(
        self,
        loss: Callable[..., Tensor],
        embedding_size: int,
        memory_size: int = 1024,
        miner: Callable[..., tuple[Tensor, ...]] | None = None,
        **kwargs: Any,
    ):
        original.ModuleWithRecords.__init__(self, **kwargs)  # skips the __init__ of the original class
        for name, value in (("embedding_size", embedding_size), ("memory_size", memory_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_support(type(self), loss)
        self.loss = loss
        self.miner = miner
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.reset_queue()
        self.add_to_recordable_attributes(list_of_names=["embedding_size", "memory_size", "queue_idx"], is_stat=False)

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the original's losses that may be wrapped."""
        return list(CROSS_BATCH)

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Raises ValueError for a name that is not among supported_losses()."""
        refuse(cls, loss_name)

    def reset_queue(self) -> None:
        """Empties the memory."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.long))
        self.queue_idx, self.has_been_filled = 0, False

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Stores batch_size rows over the oldest ones; curr_batch_idx [batch_size] holds their positions (-1: not
        stored)."""
        start = self.queue_idx
        dropped, runs, pointer = ring_slots(start, batch_size, self.memory_size)
        # New tensors, because the backward pass of an earlier loss may still need the old ones.
        self.embedding_memory, self.label_memory = self.embedding_memory.clone(), self.label_memory.clone()
        for slot, row, length in runs:
            self.embedding_memory[slot : slot + length] = embeddings[row : row + length]
            self.label_memory[slot : slot + length] = labels[row : row + length]
        rows = torch.arange(batch_size, device=labels.device)
        self.curr_batch_idx = torch.where(rows < dropped, -1, (start + rows) % self.memory_size)
        self.has_been_filled = self.has_been_filled or start + batch_size >= self.memory_size
        self.queue_idx = pointer

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, D], labels [B] -> loss. Raises ValueError or TypeError naming the argument."""
        if indices_tuple is not None and enqueue_mask is not None:
            raise ValueError("indices_tuple and enqueue_mask cannot both be given")
        check_inputs("embeddings", embeddings, "labels", labels)
        if labels is None:
            raise ValueError("labels must be given: the memory keeps them")
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must have {self.embedding_size} features, got {tuple(embeddings.shape)}")
        self.reset_stats()
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
            enqueue_mask = enqueue_mask.to(device)
            self.add_to_memory(embeddings[enqueue_mask], labels[enqueue_mask], int(enqueue_mask.sum()))
            embeddings, labels, own = embeddings[~enqueue_mask], labels[~enqueue_mask], None
        fill = self.memory_size if self.has_been_filled else self.queue_idx
        memory, memory_labels = self.embedding_memory[:fill], self.label_memory[:fill]
        if isinstance(self.loss, PairLoss) and self.miner is None and indices_tuple is None:
            return self.loss.against(embeddings, labels, memory, memory_labels, own)
        if indices_tuple is not None:
            indices_tuple = candidates_at(indices_tuple, self.curr_batch_idx)
        pairs = self.create_indices_tuple(embeddings, labels, memory, memory_labels, indices_tuple, own is not None)
        return self.loss(embeddings, labels, pairs, memory, memory_labels)

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...]:
        """Pairs or triplets of the batch against the memory, then those of input_indices_tuple, whose positives and
        negatives are positions in the memory."""
        if self.miner is None:
            found: tuple[Tensor, ...] = all_pairs(labels, L_mem, None)
        else:
            found = self.miner(embeddings, labels, E_mem, L_mem)
        if do_remove_self_comparisons:
            found = without(found, self.curr_batch_idx)
        return found if input_indices_tuple is None else joined(found, input_indices_tuple)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "queue_idx"] = torch.tensor(self.queue_idx)
        destination[prefix + "has_been_filled"] = torch.tensor(self.has_been_filled)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        names = {name: prefix + name for name in ("queue_idx", "has_been_filled")}
        kept: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, kept, errors)
        unexpected.extend(key for key in kept if key not in names.values())
        if all(key in state_dict for key in names.values()):
            pointer = int(state_dict[names["queue_idx"]])
            if not 0 <= pointer < self.memory_size:
                errors.append(f"queue_idx must be within a memory of {self.memory_size}, got {pointer}")
                return
            self.queue_idx, self.has_been_filled = pointer, bool(state_dict[names["has_been_filled"]])
        elif prefix + "embedding_memory" in state_dict:
            used = self.embedding_memory.ne(0).any(1).nonzero()
            fill = int(used[-1]) + 1 if used.numel() else 0
            self.queue_idx, self.has_been_filled = fill % self.memory_size, fill == self.memory_size
