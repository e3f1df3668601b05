"""Replaces lightly's contrastive losses: `from mi_kernels.compat.lightly import NTXentLoss, MemoryBankModule, DCLLoss`.

Results are those of the original, and the memory bank starts with the same random unit rows. Differences:
* Contents, pointer and fill of the bank are saved. Checkpoints of lightly, which have none of them, can still be
  loaded.
* 16-bit outputs give an fp32 loss, and a row of zeros is finite in fp16 too.
* DCLLoss without a negative, and with a temperature of 0, raises ValueError; the original returns NaN.
* MemoryBankModule has two additional options: start="empty" avoids random negatives, and wrap=True keeps all rows of a
  batch
  that passes the end of the bank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..losses import common, negatives
from ..memory_bank import ring_slots
from ..ops.common.checks import check_bool, check_number
from ..ops.common.rows import unit_rows
from ..ops.dot_critic import api

__all__ = ["DCLLoss", "DCLWLoss", "MemoryBankModule", "NTXentLoss", "negative_mises_fisher_weights"]


def _check_settings(temperature: float, gather_distributed: bool) -> None:
    check_number("temperature", temperature)
    check_bool(gather_distributed=gather_distributed)
    if not abs(temperature) >= 1e-8:
        raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8, but it divides the scores")
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed must be False: this torch was built without torch.distributed")


def _check_outputs(out0: Tensor, out1: Tensor) -> None:
    common.check_same_shape("out0", out0, "out1", out1)
    if out0.dim() != 2 or not out0.shape[0]:
        raise ValueError(f"out0 must have shape [N, D] with N >= 1, got {tuple(out0.shape)}")
    if not out0.is_floating_point():
        raise ValueError(f"out0 must be floating point, got {out0.dtype}")


class MemoryBankModule(nn.Module):
    """A bank of earlier outputs as negatives: forward(output [B, ...], update=...) -> (output, negatives or None).

    size: (rows, *dims). 0 disables the bank; with a single number the first output determines the dims.
    feature_dim_first: exchange the first and the last dimension of the negatives.
    start: "random" fills the bank with random unit vectors, as in lightly; "empty" returns only stored rows.
    wrap: if True, a batch that reaches the end of the bank continues at its beginning (of a batch larger than the bank,
        the last rows remain). If False, the rest of the batch is dropped, as in lightly.

    The negatives are a copy of the rows that were stored before the call, (rows, *dims). labels are ignored. To use
    such a bank with NTXentLoss: `loss.memory_bank = MemoryBankModule((4096, 128), start="empty", wrap=True)`.
    Subclasses may call `_init_memory_bank(size)` and `_dequeue_and_enqueue(batch)`, as with the original.
    """

    bank: Tensor
    bank_ptr: Tensor
    bank_fill: Tensor

    def __init__(
        self,
        size: int | Sequence[int] = 65536,
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        *,
        start: str = "random",
        wrap: bool = False,
    ):
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if not sizes or not all(isinstance(x, int) for x in sizes):
            raise ValueError(f"size must be an integer or a sequence of integers, got {size!r}")
        if any(x < 0 for x in sizes):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if start not in ("random", "empty"):
            raise ValueError(f"start must be 'random' or 'empty', got {start!r}")
        self.size = sizes
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.start = start
        self.wrap = wrap
        kept = sizes[0] > 0
        self.register_buffer("bank", torch.zeros(sizes), persistent=kept)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=kept)
        self.register_buffer("bank_fill", torch.zeros(1, dtype=torch.long), persistent=kept)
        if len(sizes) > 1:
            self._init_memory_bank(sizes)
        elif kept:
            warnings.warn(
                f"Memory bank size 'size={size}' does not specify feature dimension. It is recommended to set the "
                "feature dimension with 'size=(n, dim)' when creating the memory bank. Distributed training might "
                "fail if the feature dimension is not set.",
                UserWarning,
                stacklevel=2,
            )

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not self.size[0]:
            return output, None
        if self.bank.dim() == 1:
            self._init_memory_bank((*self.size, *output.shape[1:]))
        if output.shape[1:] != self.bank.shape[1:]:
            dims = ", ".join(str(d) for d in self.bank.shape[1:])
            raise ValueError(f"output must have shape [B, {dims}], got {tuple(output.shape)}")
        negatives = self.bank.detach().clone()
        if self.start == "empty":
            negatives = negatives[: int(self.bank_fill)]
        if update:
            self._dequeue_and_enqueue(output)
        return output, negatives.transpose(0, -1) if self.feature_dim_first else negatives

    @torch.no_grad()
    def _init_memory_bank(self, size: tuple[int, ...]) -> None:
        if self.start == "random":
            # Drawn on the CPU in fp32, so that a seed gives the same rows as in lightly.
            self.bank = F.normalize(torch.randn(size).type_as(self.bank), dim=-1)
        else:
            self.bank = self.bank.new_zeros(size)
        self.bank_ptr = torch.zeros_like(self.bank_ptr)
        self.bank_fill = torch.zeros_like(self.bank_fill)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        batch = batch.detach()
        if self.gather_distributed:
            batch = distributed.gather(batch)
        pointer = int(self.bank_ptr)
        if not self.wrap:
            batch = batch[: self.size[0] - pointer]
        _, runs, pointer = ring_slots(pointer, batch.shape[0], self.size[0])
        for slot, row, length in runs:
            self.bank[slot : slot + length] = batch[row : row + length].to(self.bank)
        self.bank_ptr.fill_(pointer)
        self.bank_fill.add_(batch.shape[0]).clamp_(max=self.size[0])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        stored = state_dict.get(prefix + "bank")
        if stored is not None and self.bank.dim() == 1 and stored.shape[:1] == self.bank.shape:
            self.bank = self.bank.new_zeros(stored.shape)
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, found, *rest)
        # Checkpoints of lightly contain no bank; loading one leaves the bank unchanged.
        missing.extend(found if stored is not None else [])


class NTXentLoss(nn.Module):
    """SimCLR's NT-Xent over both views, or, with a memory bank, MoCo's loss of out0 against out1 and the bank.

    out0, out1 [B, D] are normalised here. temperature divides the scores; it may be negative, but not 0. The bank
    stores out1 if out0 requires a gradient. gather_distributed uses the negatives of all ranks. Cost: 3N with N = 8 B^2
    D FLOP, O(B D) memory.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        _check_settings(temperature, gather_distributed)
        self.memory_bank = MemoryBankModule(size=memory_bank_size, gather_distributed=gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        scale = 1 / self.temperature
        _check_outputs(out0, out1)
        if not self.memory_bank.size[0]:
            if self.gather_distributed:
                return distributed.nt_xent_scaled(out0, out1, scale)
            return common.nt_xent_scaled(out0, out1, scale)
        query, key = unit_rows(out0), unit_rows(out1)
        _, bank = self.memory_bank(key, update=out0.requires_grad)
        return negatives.shared_negatives(query, key, bank.mT.to(query), scale, "mean")


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - B softmax_i(<out0_i, out1_i> / sigma), [B], without a gradient (Yeh et al. 2022, section 3.2)."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


class DCLLoss(nn.Module):
    """Decoupled contrastive learning (Yeh et al. 2022, eq. 6): NT-Xent without the positive in the denominator.

    out0, out1 [B, D], B >= 2, are normalised here. weight_fn(out0, out1) -> [B] gives weights of the positive scores.
    Cost: 4N with N = 8 B^2 D FLOP, O(B D) memory.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        _check_settings(temperature, gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        _check_outputs(out0, out1)
        short = out0.dtype  # dtype for the kernels; the terms with positives are kept in the accumulation type
        out0, out1 = unit_rows(out0), unit_rows(out1)
        rank, views0, views1 = 0, out0, out1
        if self.gather_distributed:
            rank = distributed.rank_and_size()[0]
            views0, views1 = distributed.gather(out0), distributed.gather(out1)
        items = out0.shape[0]
        if views0.shape[0] < 2:
            raise ValueError(f"out0 must hold at least two samples, or there is no negative, got {tuple(out0.shape)}")
        own = torch.arange(rank * items, (rank + 1) * items, device=out0.device)
        every = torch.arange(views0.shape[0], device=out0.device).repeat(2)
        positive = (out0 * out1).sum(1) / self.temperature
        candidates = torch.cat([views0, views1]).to(short)
        losses: list[Tensor] = []
        for one, other in ((out0, out1), (out1, out0)):
            found = api.statistics(
                one.to(short), candidates, 1 / self.temperature, row_ids=own, col_ids=every, pairs="unequal_ids"
            )
            assert found.row_lse is not None
            weight = 1 if self.weight_fn is None else self.weight_fn(one, other)
            losses.append((found.row_lse - positive * weight).mean())
        return (losses[0] + losses[1]) / 2


class DCLWLoss(DCLLoss):
    """DCLLoss weighted by `negative_mises_fisher_weights`."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        # A partial instead of a closure, because it can be pickled.
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)
