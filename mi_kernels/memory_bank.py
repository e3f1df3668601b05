"""Keys of earlier batches as negatives (MoCo, He et al. 2020, section 3.2; XBM, Wang et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.common.checks import check_bool, check_tensor
from .ops.common.dtypes import accumulate_dtype


def ring_slots(pointer: int, rows: int, size: int) -> tuple[int, list[tuple[int, int, int]], int]:
    """Where to write `rows` new rows into a ring buffer of `size` slots whose next slot is `pointer`.

    Returns the number of leading rows to skip (a batch larger than the ring keeps only its last `size` rows), the
    contiguous runs to copy as (first slot, first row, length), and the next pointer.
    """
    dropped = max(0, rows - size)
    slot, row, left = (pointer + dropped) % size, dropped, rows - dropped
    runs = []
    while left:
        length = min(left, size - slot)
        runs.append((slot, row, length))
        slot, row, left = (slot + length) % size, row + length, left - length
    return dropped, runs, (pointer + rows) % size


class MemoryBank(nn.Module):
    """A first-in, first-out queue of the last `size` keys, used as negatives beyond the current batch.

    enqueue(keys [B, dim]) stores detached rows. negatives() returns a copy of the stored rows, [fill, dim], so later
    batches do not change it. Contents, pointer and fill are persistent buffers: a resumed run sees the same negatives
    as an uninterrupted one. Two differences from the queues of MoCo and lightly: the bank starts empty instead of with
    random vectors, and a batch that passes the end wraps around without losing rows. A batch larger than the bank
    leaves its last `size` rows.

    normalize: whether to store rows scaled to unit length.
    labels: whether to store an integer (class or identity) with each row.
    dtype: floating-point type of the stored rows.

    `mk.info_nce(query, key, negative_keys=bank.negatives())` accepts an empty bank; the loss is then 0. In distributed
    training, enqueue `mk.distributed.gather(keys)` so that every rank holds the same bank. The bank takes size * dim
    numbers of memory; enqueue copies B * dim and negatives() copies fill * dim numbers. Raises ValueError or TypeError
    that names the argument.
    """

    keys: Tensor
    ids: Tensor | None
    pointer: Tensor
    fill: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        normalize: bool = False,
        labels: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_bool(normalize=normalize, labels=labels)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self.size, self.dim, self.normalize = size, dim, normalize
        self.register_buffer("keys", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.long, device=device) if labels else None)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("fill", torch.zeros((), dtype=torch.long, device=device))
        # Copies of the two buffers on the host: reading the buffers would wait for the GPU.
        self._pointer = self._fill = 0

    def __len__(self) -> int:
        return self._fill

    def _check(self, keys: Tensor, labels: Tensor | None) -> None:
        check_tensor("keys", keys)
        if keys.dim() != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys must have shape [B, {self.dim}], got {tuple(keys.shape)}")
        if not keys.is_floating_point():
            raise ValueError(f"keys must be floating point, got {keys.dtype}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on the bank's device, {self.keys.device}, got {keys.device}")
        if (labels is None) != (self.ids is None):
            raise ValueError(f"labels must {'not ' if self.ids is None else ''}be given: labels={self.ids is not None}")
        if labels is None:
            return
        check_tensor("labels", labels)
        if labels.shape != keys.shape[:1]:
            raise ValueError(f"labels must have shape {tuple(keys.shape[:1])}, got {tuple(labels.shape)}")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must hold integers, got {labels.dtype}")

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Stores keys [B, dim] (with labels [B] if the bank keeps them) over the oldest rows."""
        self._check(keys, labels)
        # F.normalize divides by at least 1e-12, which is 0 in fp16: a row of zeros would become NaN.
        rows = F.normalize(keys.to(accumulate_dtype(keys.dtype)), dim=-1) if self.normalize else keys
        _, runs, self._pointer = ring_slots(self._pointer, rows.shape[0], self.size)
        for slot, row, length in runs:
            self.keys[slot : slot + length] = rows[row : row + length].to(self.keys.dtype)
            if self.ids is not None and labels is not None:
                self.ids[slot : slot + length] = labels[row : row + length]
        self._fill = min(self.size, self._fill + rows.shape[0])
        self.pointer.fill_(self._pointer)
        self.fill.fill_(self._fill)

    def negatives(self) -> Tensor:
        """Returns a copy of the stored keys, [fill, dim], in the order of the slots."""
        return self.keys[: self._fill].clone()

    def labels(self) -> Tensor:
        """Returns the labels of the rows of negatives(), [fill]. Raises ValueError if the bank keeps no labels."""
        if self.ids is None:
            raise ValueError("labels are not kept: build the bank with labels=True")
        return self.ids[: self._fill].clone()

    def reset(self) -> None:
        """Empties the bank."""
        self._pointer = self._fill = 0
        for buffer in self.buffers():
            buffer.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        pointer, fill = int(self.pointer), int(self.fill)
        if not (0 <= pointer < self.size and 0 <= fill <= self.size):
            raise ValueError(f"pointer and fill must be within a bank of {self.size}, got {pointer} and {fill}")
        self._pointer, self._fill = pointer, fill

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, normalize={self.normalize}, labels={self.ids is not None}"
