"""open_clip's exchanges of features between neighbouring ranks, for code that calls them. Our losses do not use
them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: Any) -> None:
    operations = [dist.P2POp(dist.isend, t.contiguous(), to, group=group) for t, to in sends]
    operations += [dist.P2POp(dist.irecv, t, source, group=group) for t, source in receives]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def neighbour_exchange(from_rank: int, to_rank: int, tensor: Tensor, group: Any = None) -> Tensor:
    """Sends tensor to to_rank and returns the tensor of from_rank. Shapes and dtypes must be equal. No gradient."""
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    _exchange([(tensor, to_rank)], [(received, from_rank)], group)
    return received


def neighbour_exchange_bidir(
    left_rank: int, right_rank: int, tensor_to_left: Tensor, tensor_to_right: Tensor, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Sends one tensor to each neighbour; returns (from the right, from the left). No gradient."""
    from_left = torch.empty_like(tensor_to_right, memory_format=torch.contiguous_format)
    from_right = torch.empty_like(tensor_to_left, memory_format=torch.contiguous_format)
    # With two ranks both neighbours are the same rank, so the order of sends and receives matters: right first.
    _exchange([(tensor_to_right, right_rank), (tensor_to_left, left_rank)],
              [(from_left, left_rank), (from_right, right_rank)], group)  # fmt: skip
    return from_right, from_left


class NeighbourExchange(torch.autograd.Function):
    """`neighbour_exchange` with a gradient, which is sent in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, from_rank: int, to_rank: int, group: Any, tensor: Any) -> Any:
        ctx.ranks, ctx.group = (from_rank, to_rank), group
        return neighbour_exchange(from_rank, to_rank, tensor, group=group)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        from_rank, to_rank = ctx.ranks
        return None, None, None, NeighbourExchange.apply(to_rank, from_rank, ctx.group, g)


class NeighbourExchangeBidir(torch.autograd.Function):
    """`neighbour_exchange_bidir` with gradients, which are sent in the opposite directions."""

    @staticmethod
    def forward(
        ctx: Any, left_rank: int, right_rank: int, group: Any, tensor_to_left: Any, tensor_to_right: Any
    ) -> Any:
        ctx.ranks, ctx.group = (left_rank, right_rank), group
        return neighbour_exchange_bidir(left_rank, right_rank, tensor_to_left, tensor_to_right, group=group)

    @staticmethod
    def backward(ctx: Any, from_right: Any, from_left: Any) -> Any:
        # The tensor from the right was the right neighbour's tensor_to_left, so its gradient goes back to the right.
        left_rank, right_rank = ctx.ranks
        exchanged = NeighbourExchangeBidir.apply(left_rank, right_rank, ctx.group, from_left, from_right)
        to_right, to_left = exchanged
        return None, None, None, to_left, to_right


def neighbour_exchange_with_grad(from_rank: int, to_rank: int, tensor: Tensor, group: Any = None) -> Tensor:
    """`neighbour_exchange` with a gradient, differentiable twice."""
    return NeighbourExchange.apply(from_rank, to_rank, group, tensor)


def neighbour_exchange_bidir_with_grad(
    left_rank: int, right_rank: int, tensor_to_left: Tensor, tensor_to_right: Tensor, group: Any = None
) -> tuple[Tensor, Tensor]:
    """`neighbour_exchange_bidir` with gradients, differentiable twice."""
    return NeighbourExchangeBidir.apply(left_rank, right_rank, group, tensor_to_left, tensor_to_right)
