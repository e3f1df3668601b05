"""Replaces lightly's contrastive losses: `from mi_kernels.compat.lightly import NTXentLoss, MemoryBankModule, DCLLoss`.

Differences: the memory bank starts empty (lightly fills it with random vectors that are negatives from the first
step: while it is empty the loss is 0), loses no row where it wraps around, and its contents, pointer and fill are saved
(a checkpoint of lightly, which has none of them, still loads). 16-bit outputs give an fp32 loss; DCLLoss without a
negative raises ValueError.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..losses import common
from ..memory_bank import ring_slots
from ..ops.common.dtypes import accumulate_dtype
from ..ops.dot_critic import api

__all__ = ["DCLLoss", "DCLWLoss", "MemoryBankModule", "NTXentLoss", "negative_mises_fisher_weights"]


def _check_settings(temperature: float, gather_distributed: bool) -> None:
    if abs(temperature) < 1e-8:
        raise ValueError(f"temperature must not be 0, got {temperature}")
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed must be False: this torch was built without torch.distributed")


class MemoryBankModule(nn.Module):
    """The last outputs as negatives: forward(output [B, D], update=...) -> (output, negatives or None).

    size: (rows, dim); 0 turns the bank off; one number takes dim from the first output. Negatives are a copy of the
    rows stored before this call, (dim, rows) or, with feature_dim_first=False, (rows, dim). labels are ignored.
    """

    bank: Tensor
    bank_ptr: Tensor
    bank_fill: Tensor

    def __init__(
        self,
        size: int | Sequence[int] = 65536,
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ):
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if not 1 <= len(sizes) <= 2 or any(x < 0 for x in sizes) or (len(sizes) == 2 and not sizes[1]):
            raise ValueError(f"size must be 0, rows or (rows, dim) without negative numbers, got {size}")
        self.size = sizes
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        if sizes[0] and len(sizes) == 1:
            warnings.warn(
                f"size={size} names no feature dimension, the first output's is taken: pass ({size}, dim) instead",
                UserWarning,
                stacklevel=2,
            )
        kept = sizes[0] > 0
        self.register_buffer("bank", torch.zeros(sizes if len(sizes) == 2 else (sizes[0], 0)), persistent=kept)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=kept)
        self.register_buffer("bank_fill", torch.zeros(1, dtype=torch.long), persistent=kept)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not self.size[0]:
            return output, None
        if not self.bank.shape[1]:
            self.bank = self.bank.new_zeros(self.size[0], output.shape[1])
        if output.dim() != 2 or output.shape[1] != self.bank.shape[1]:
            raise ValueError(f"output must have shape [B, {self.bank.shape[1]}], got {tuple(output.shape)}")
        negatives = self.bank[: int(self.bank_fill)].clone()
        if update:
            self._enqueue(output.detach())
        return output, negatives.mT if self.feature_dim_first else negatives

    @torch.no_grad()
    def _enqueue(self, batch: Tensor) -> None:
        if self.gather_distributed:
            batch = distributed.gather(batch)
        _, runs, pointer = ring_slots(int(self.bank_ptr), batch.shape[0], self.size[0])
        for slot, row, length in runs:
            self.bank[slot : slot + length] = batch[row : row + length].to(self.bank)
        self.bank_ptr.fill_(pointer)
        self.bank_fill.fill_(min(self.size[0], int(self.bank_fill) + batch.shape[0]))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        stored = state_dict.get(prefix + "bank")
        if stored is not None and len(self.size) == 1 and stored.dim() == 2 and stored.shape[0] == self.size[0]:
            self.bank = self.bank.new_zeros(stored.shape)
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, found, *rest)
        # lightly saves no bank: such a state leaves it as it is.
        missing.extend(found if stored is not None else [])


class NTXentLoss(nn.Module):
    """SimCLR's NT-Xent over both views, or, with a memory bank, MoCo's loss of out0 against out1 and the bank.

    out0, out1 [N, D] are normalised here; temperature divides, may be negative, not 0. The bank takes out1 when out0
    requires a gradient. gather_distributed takes the negatives of all ranks. 3N FLOP (N = 8 B^2 D), O(B D) memory.
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
        common.check_same_shape("out0", out0, "out1", out1)
        if not self.memory_bank.size[0]:
            if self.gather_distributed:
                return distributed.nt_xent_scaled(out0, out1, scale)
            return common.nt_xent_scaled(out0, out1, scale)
        if out0.dim() != 2 or not out0.shape[0]:
            raise ValueError(f"out0 must have shape [N, D] with N >= 1, got {tuple(out0.shape)}")
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        _, negatives = self.memory_bank(out1, update=out0.requires_grad)
        negatives = negatives.mT.to(out0)
        return common.explicit_negatives(out0, out1, negatives, scale, "unpaired", None).mean()


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - B softmax_i(<out0_i, out1_i> / sigma), [B], without a gradient (Yeh et al. 2022, section 3.2)."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


class DCLLoss(nn.Module):
    """Decoupled contrastive learning (Yeh et al. 2022, eq. 6): NT-Xent whose denominator leaves the positive out.

    out0, out1 [N, D], N >= 2, are normalised here. weight_fn(out0, out1) -> [N] weighs the positive scores.
    4N FLOP (N = 8 B^2 D), O(B D) memory.
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
        common.check_same_shape("out0", out0, "out1", out1)
        if out0.dim() != 2:
            raise ValueError(f"out0 must have shape [N, D], got {tuple(out0.shape)}")
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        rank, views0, views1 = 0, out0, out1
        if self.gather_distributed:
            rank = distributed.rank_and_size()[0]
            views0, views1 = distributed.gather(out0), distributed.gather(out1)
        items = out0.shape[0]
        if views0.shape[0] < 2:
            raise ValueError(f"out0 must hold at least two samples, or there is no negative, got {tuple(out0.shape)}")
        own = torch.arange(rank * items, (rank + 1) * items, device=out0.device)
        every = torch.arange(views0.shape[0], device=out0.device).repeat(2)
        wide = accumulate_dtype(out0.dtype)
        positive = (out0.to(wide) * out1.to(wide)).sum(1) / self.temperature
        candidates = torch.cat([views0, views1])
        losses: list[Tensor] = []
        for one, other in ((out0, out1), (out1, out0)):
            found = api.statistics(
                one, candidates, 1 / self.temperature, row_ids=own, col_ids=every, pairs="unequal_ids"
            )
            assert found.row_lse is not None
            weight = 1 if self.weight_fn is None else self.weight_fn(one, other)
            losses.append((found.row_lse - positive * weight).mean())
        return (losses[0] + losses[1]) / 2


class DCLWLoss(DCLLoss):
    """DCLLoss weighted by `negative_mises_fisher_weights`."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        def weight_fn(out0: Tensor, out1: Tensor) -> Tensor:
            return negative_mises_fisher_weights(out0, out1, sigma)

        super().__init__(temperature, weight_fn, gather_distributed)
