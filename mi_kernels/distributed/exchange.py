"""The ranks of a group, their numbers of rows, and a differentiable gather of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_MAX_DIMS = 8


class Ranks(NamedTuple):
    """The position of this process in a group, and the number of rows of every rank."""

    rank: int
    sizes: tuple[int, ...]  # rows of every rank

    @property
    def first(self) -> int:
        """The index of this rank's first row among the rows of all ranks."""
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def weight(self) -> float:
        """The weight of a row. The mean over ranks of sums with this weight is the mean over all rows."""
        return len(self.sizes) / self.total


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """This process's rank in the group and the number of ranks; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _described(t: Tensor, dim: int) -> list[int]:
    """Encodes dtype, number of dimensions, rows and other dimensions of t as numbers, to compare them between ranks."""
    others = [n for d, n in enumerate(t.shape) if d != dim % t.dim()]
    return [_DTYPES.index(t.dtype), t.dim(), t.shape[dim], *others, *[0] * (_MAX_DIMS - t.dim())]


def meet(t: Tensor, *, dim: int = 0, group: Any = None, name: str = "t") -> Ranks:
    """Exchanges the shapes of t and returns the number of rows (along `dim`) of every rank.

    If dtype, number of dimensions or another dimension differ, all ranks raise the same ValueError. One collective of a
    few bytes, for which the host waits.
    """
    rank, size = rank_and_size(group)
    if t.dtype not in _DTYPES:
        raise ValueError(f"{name} must have one of the dtypes {', '.join(map(str, _DTYPES))}, got {t.dtype}")
    if not 1 <= t.dim() <= _MAX_DIMS:
        raise ValueError(f"{name} must have 1 to {_MAX_DIMS} dimensions, got shape {tuple(t.shape)}")
    if size == 1:
        return Ranks(rank, (t.shape[dim],))
    mine = torch.tensor(_described(t, dim), device=t.device)
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine, group=group)
    found = torch.stack(every).tolist()
    if any(f[:2] + f[3:] != found[0][:2] + found[0][3:] for f in found):
        shown = "; ".join(
            f"rank {r}: {_DTYPES[f[0]]} with {f[2]} rows and other dimensions {f[3 : 2 + f[1]]}"
            for r, f in enumerate(found)
        )
        raise ValueError(f"{name} must agree on all ranks in all but the number of rows, got {shown}")
    return Ranks(rank, tuple(f[2] for f in found))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks, group: Any) -> Tensor:
        ctx.settings = (ranks, group)
        longest = max(ranks.sizes)
        # Collectives need shards of equal size, so shorter shards are padded and the padding is removed afterwards.
        padded = t if t.shape[0] == longest else torch.cat([t, t.new_zeros(longest - t.shape[0], *t.shape[1:])])
        shards = [torch.empty_like(padded) for _ in ranks.sizes]
        dist.all_gather(shards, padded.contiguous(), group=group)
        return torch.cat([shard[:rows] for shard, rows in zip(shards, ranks.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SumOwnShard.apply(g, *ctx.settings), None, None


class _SumOwnShard(torch.autograd.Function):
    """The transpose of gather: sums over the ranks and returns this rank's rows."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, ranks: Ranks, group: Any) -> Tensor:
        ctx.settings = (ranks, group)
        even = len(set(ranks.sizes)) == 1
        if even and dist.get_backend(group) == "nccl":
            own = g.new_empty(ranks.sizes[0], *g.shape[1:])
            dist.reduce_scatter_tensor(own, g.contiguous(), group=group)
            return own
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total[ranks.first : ranks.first + ranks.sizes[ranks.rank]].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Gather.apply(g.contiguous(), *ctx.settings), None, None


def gather_rows(t: Tensor, ranks: Ranks, *, dim: int = 0, group: Any = None) -> Tensor:
    """`gather` with known numbers of rows, without an exchange of shapes."""
    if len(ranks.sizes) == 1:
        return t
    return _Gather.apply(t.movedim(dim, 0).contiguous(), ranks, group).movedim(0, dim)


def gather(t: Tensor, *, dim: int = 0, group: Any = None, sizes: Sequence[int] | None = None) -> Tensor:
    """Concatenates the tensors of all ranks along `dim`, in the order of the ranks: [B, ...] -> [sum of all B, ...].

    t: the tensor of this rank. Ranks may hold different numbers of rows, including zero. If dtypes or other dimensions
        differ, every rank raises the same ValueError.
    dim: the dimension of the rows.
    group: a torch process group; by default the global one.
    sizes: the number of rows of every rank, if known. Otherwise they are exchanged, and the host waits for that.

    Gradients are summed over the ranks and return to the owner of a row; they can be differentiated again. Sends (W -
    1) times the longest shard in each direction.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if not t.dim():
        raise ValueError("t must have at least one dimension, got a 0-d tensor")
    rank, size = rank_and_size(group)
    if size == 1:
        return t
    if sizes is None:
        return gather_rows(t, meet(t, dim=dim, group=group), dim=dim, group=group)
    return gather_rows(t, known(sizes, rank, size, t.shape[dim]), dim=dim, group=group)


def known(sizes: Sequence[int], rank: int, size: int, rows: int) -> Ranks:
    """Checks the caller's sizes and returns them as Ranks."""
    found = tuple(sizes)
    if len(found) != size or any(not isinstance(n, int) or n < 0 for n in found) or found[rank] != rows:
        raise ValueError(f"sizes must hold the rows of each of {size} ranks, {rows} on rank {rank}, got {sizes!r}")
    return Ranks(rank, found)
