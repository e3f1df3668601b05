"""Statistics of the scores against the columns of all ranks, which travel around a ring.

Each rank keeps its rows x [G, B, D] and starts with its own columns y. In W steps every block of columns visits every
rank. While a rank computes with a block, it already sends the block to the next rank, so transfer and computation
overlap. The accumulated results of a block (its column LSEs in forward, its gradient in backward) follow one step
behind and end at the owner. A rank holds three shards at a time for any W; `gather` holds W shards.

Per rank and ring step, forward: 2 B^2 D FLOP and B D numbers sent; backward: 6 B^2 D FLOP and 2 B D numbers sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.common.checks import check_number
from ..ops.common.dtypes import lse_dtype
from ..ops.common.rows import sums_of
from ..ops.dot_critic.schema import (
    ALL,
    COL_LSE,
    GRADIENTS,
    NEED_ROW_BIAS,
    NEED_SCALE,
    NEED_X,
    NEED_Y,
    OFF_DIAGONAL,
    ROW_LSE,
    SIGNED,
    SOFTPLUS,
    UNEQUAL_IDS,
    UNEQUAL_IDS_OR_POSITIVE,
)
from .exchange import Ranks

__all__ = ["COL_LSE", "Columns", "Found", "ROW_LSE", "SOFTPLUS", "statistics"]


class Columns(NamedTuple):
    """Settings shared by the forward and the backward pass."""

    ranks: Ranks
    group: Any
    stats: int  # ROW_LSE | COL_LSE | SOFTPLUS
    off_diagonal: bool  # row i equals column i of this rank, and no row is scored against itself
    backend: str
    dtype: torch.dtype  # dtype of the transferred columns: that of the caller's features, so nothing is rounded

    def pairs(self, owner: int, ids: bool) -> tuple[int, int, int]:
        """The arguments pairs, positive_shift and stats of the operators for the columns of rank `owner`."""
        own = owner == self.ranks.rank
        if self.off_diagonal:
            return OFF_DIAGONAL if own else ALL, -1, self.stats
        if self.stats & SOFTPLUS:
            return ALL, 0 if own else -1, self.stats | (SIGNED if own else 0)
        if ids:  # pairs with equal ids are excluded, except the positive pair
            return UNEQUAL_IDS_OR_POSITIVE if own else UNEQUAL_IDS, 0 if own else -1, self.stats
        return ALL, -1, self.stats


class _Neighbours:
    """Sends to the next rank and receives from the previous rank of the ring."""

    def __init__(self, columns: Columns):
        rank, self.sizes = columns.ranks
        peer = (lambda r: r) if columns.group is None else (lambda r: dist.get_global_rank(columns.group, r))
        self.group, self.rank = columns.group, rank
        self.next, self.previous = peer((rank + 1) % len(self.sizes)), peer((rank - 1) % len(self.sizes))

    def pass_on(self, tensors: Sequence[Tensor], owner: int, tag: int) -> _Transfer:
        """Starts to send tensors [G, rows, ...] of the columns of `owner` and to receive those of the rank before
        it."""
        rows = self.sizes[(owner - 1) % len(self.sizes)]
        coming = [t.new_empty(t.shape[0], rows, *t.shape[2:]) for t in tensors]
        moves = []
        for i, (t, c) in enumerate(zip(tensors, coming, strict=True)):
            if t.numel():
                moves.append(dist.P2POp(dist.isend, t.contiguous(), self.next, self.group, tag + i))
            if c.numel():
                moves.append(dist.P2POp(dist.irecv, c, self.previous, self.group, tag + i))
        return _Transfer(dist.batch_isend_irecv(moves) if moves else [], moves, coming)

    def visits(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yields the owner and the columns of every rank as they arrive, starting with this rank's own columns."""
        owner = self.rank
        for step in range(len(self.sizes)):
            last = step == len(self.sizes) - 1
            transfer = None if last else self.pass_on(tensors, owner, 0)
            yield owner, tensors
            if transfer is not None:
                tensors, owner = transfer.received(), (owner - 1) % len(self.sizes)


class _Transfer:
    """Pending sends and receives. `moves` keeps references to the sent tensors until they have left."""

    def __init__(self, works: list[Any], moves: list[Any], coming: list[Tensor]):
        self.works, self.moves, self.coming = works, moves, coming

    def received(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.coming


_COLLECTED = 8  # first message tag of accumulated results; smaller tags are for the columns


class _Collected:
    """Accumulated results that travel one step behind the columns. Every rank adds to them, and they end at the
    owner."""

    def __init__(self, neighbours: _Neighbours, start: list[Tensor]):
        self.neighbours, self.arrived = neighbours, start
        self.transfer: _Transfer | None = None

    def here(self) -> list[Tensor]:
        """The results accumulated so far for the columns that are now at this rank."""
        return self.arrived if self.transfer is None else self.transfer.received()

    def leave(self, tensors: list[Tensor], owner: int) -> None:
        self.transfer = self.neighbours.pass_on(tensors, owner, _COLLECTED)


class Found(NamedTuple):
    """The result of `statistics`; fields that were not requested are None."""

    row_lse: Tensor | None  # [*, A]
    col_lse: Tensor | None  # [*, B]
    row_softplus: Tensor | None  # [*, A]
    class_sums: Tensor | None  # [classes + 1, D]; the last entry of both is for columns that belong to no class
    class_counts: Tensor | None  # [classes + 1]


def class_of(classes: Tensor, labels: Tensor) -> Tensor:
    """The first position of each label in the sorted `classes`, or len(classes) if it is not one of them. Needs no
    value on the host."""
    position = torch.searchsorted(classes, labels).clamp(max=classes.shape[0] - 1)
    return torch.where(classes[position] == labels, position, classes.shape[0])


class _Around(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor | float,
        bias: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        classes: Any,
        columns: Columns,
    ) -> Any:
        wide = lse_dtype(x.device)
        row = x.new_full(x.shape[:2] if columns.stats & ROW_LSE else (0,), -torch.inf, dtype=wide)
        soft = x.new_zeros(x.shape[:2] if columns.stats & SOFTPLUS else (0,))
        number = 0 if classes is None else classes.shape[0]
        sums, counts = x.new_zeros(number + 1, x.shape[2]), x.new_zeros(number + 1)
        neighbours = _Neighbours(columns)
        start = [x.new_full(y.shape[:2], -torch.inf, dtype=wide)] if columns.stats & COL_LSE else []
        collected = _Collected(neighbours, start)
        sent = y.to(columns.dtype)
        for owner, (block, *ids) in neighbours.visits([sent] if col_ids is None else [sent, col_ids]):
            part = None
            if x.shape[1] and block.shape[1]:
                block = block.to(x.dtype)
                pairs, shift, stats = columns.pairs(owner, row_ids is not None)
                problem = (x, block, scale, bias, None, row_ids, None if row_ids is None else ids[0])
                part = torch.ops.mi_kernels.dot_critic_stats(*problem, pairs, shift, stats, math.inf, columns.backend)
                if number:
                    position = class_of(classes, ids[0][0])
                    sums += sums_of(number + 1, position, block[0])
                    counts += sums_of(number + 1, position, counts.new_ones(position.shape))
                if columns.stats & ROW_LSE:
                    row = torch.logaddexp(row, part[0])
                if columns.stats & SOFTPLUS:
                    soft = soft + part[2]
            if columns.stats & COL_LSE:
                col = collected.here()[0]
                collected.leave([col if part is None else torch.logaddexp(col, part[1])], owner)
        col = collected.here()[0] if columns.stats & COL_LSE else x.new_empty(0)
        ctx.save_for_backward(x, y, scale, bias, row_ids, col_ids, classes, row, col)
        ctx.columns = columns
        ctx.mark_non_differentiable(counts)
        return row.to(x.dtype), col.to(x.dtype), soft, sums, counts

    @staticmethod
    def backward(ctx: Any, g_row: Any, g_col: Any, g_soft: Any, g_sums: Any, _: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("schedule='ring' has no second derivatives: use schedule='gather'")
        x, y, scale, bias, row_ids, col_ids, classes, row, col = ctx.saved_tensors
        columns: Columns = ctx.columns
        needs = NEED_X | NEED_Y | (NEED_SCALE if ctx.needs_input_grad[2] else 0)
        needs |= NEED_ROW_BIAS if ctx.needs_input_grad[3] else 0
        # gradients of x, scale and bias, which stay on this rank
        at_home = {NEED_X: torch.zeros_like(x), NEED_SCALE: torch.zeros_like(scale)}
        at_home[NEED_ROW_BIAS] = x.new_zeros(x.shape[:2])
        g_row = g_row.contiguous() if columns.stats & ROW_LSE else None
        g_soft = g_soft.contiguous() if columns.stats & SOFTPLUS else None
        of_columns = [col, g_col.contiguous()] if columns.stats & COL_LSE else []
        neighbours = _Neighbours(columns)
        collected = _Collected(neighbours, [torch.zeros_like(y)])
        travelling = [y.to(columns.dtype), *of_columns, *([] if col_ids is None else [col_ids])]
        for owner, (block, *rest) in neighbours.visits(travelling):
            dy = None
            if x.shape[1] and block.shape[1]:
                pairs, shift, stats = columns.pairs(owner, row_ids is not None)
                problem = (x, block.to(x.dtype), scale, bias, None)
                ids = (row_ids, rest[-1]) if row_ids is not None else (None, None)
                its_lse, its_g = (rest[0], rest[1]) if of_columns else (None, None)
                known = (row if g_row is not None else None, its_lse, g_row, its_g, g_soft, None, bool(stats & SIGNED))
                found = torch.ops.mi_kernels.dot_critic_grad(
                    *problem, *ids, pairs, shift, *known, needs, columns.backend
                )
                gradients = dict(zip(GRADIENTS, found, strict=True))
                dy = gradients[NEED_Y]
                for need, sum_here in at_home.items():
                    if needs & need:
                        sum_here += gradients[need]
                if classes is not None and classes.shape[0]:
                    dy[0] += g_sums[class_of(classes, rest[-1][0])]
            total = collected.here()[0]
            collected.leave([total if dy is None else total + dy], owner)
        home = collected.here()[0]
        of_scale = at_home[NEED_SCALE] if needs & NEED_SCALE else None
        of_bias = at_home[NEED_ROW_BIAS] if needs & NEED_ROW_BIAS else None
        return at_home[NEED_X], home, of_scale, of_bias, None, None, None, None


def statistics(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    columns: Columns,
    *,
    row_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    classes: Tensor | None = None,
) -> Found:
    """Statistics of this rank's rows x [*, A, D] against the columns y [*, B, D] of all ranks, both fp32 or fp64.

    columns.stats selects row LSEs over the columns of all ranks, column LSEs over the rows of all ranks, and row sums
    of softplus in which the positive pair (i, i) has the opposite sign.

    scale: a number, a 0-d tensor or [*].
    row_bias: [*, A].
    row_ids, col_ids: [*, A] and [*, B]. Pairs with equal ids are excluded, except the positive pair.
    classes: [C], sorted, possibly with repetitions; needs labels as col_ids and no row_ids. Requests the sum and the
        number of the columns of each class, stored at the first position of the class.

    Once differentiable in x, y, scale and row_bias; gradients are those of the sum of the ranks' losses. W - 1
    transfers of B D numbers in forward, 2 W - 1 in backward; O((A + B) D) memory.
    """
    groups = x.shape[:-2]
    if not isinstance(scale, Tensor):
        check_number("scale", scale)
        flat = torch.full((groups.numel(),), float(scale), dtype=x.dtype, device=x.device)
    elif scale.numel() == 1 or scale.shape == groups:
        flat = scale.to(x.device, x.dtype).reshape(-1).expand(groups.numel())
    else:
        raise ValueError(f"scale must be one number or have shape {tuple(groups)}, got {tuple(scale.shape)}")
    flatten = lambda t: t.reshape(groups.numel(), *t.shape[len(groups) :]).contiguous()  # noqa: E731
    integers = (
        None if t is None else flatten(t.long().expand(like.shape[:-1])) for t, like in ((row_ids, x), (col_ids, y))
    )
    bias = None if row_bias is None else flatten(row_bias.to(x.dtype))
    row, col, soft, sums, counts = _Around.apply(flatten(x), flatten(y), flat, bias, *integers, classes, columns)
    return Found(
        row.reshape(x.shape[:-1]) if columns.stats & ROW_LSE else None,
        col.reshape(y.shape[:-1]) if columns.stats & COL_LSE else None,
        soft.reshape(x.shape[:-1]) if columns.stats & SOFTPLUS else None,
        *((None, None) if classes is None else (sums, counts)),
    )
