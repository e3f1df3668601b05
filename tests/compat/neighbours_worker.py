"""One rank of test_open_clip_ranks.py and its assertions: `python -m tests.compat.neighbours_worker RANK WORLD
STORE`."""

import sys

import torch
import torch.distributed as dist

from mi_kernels.compat import open_clip


def exchange(rank: int, world: int, group=None) -> None:
    left, right = (rank - 1) % world, (rank + 1) % world

    def of(source: int, side: float) -> torch.Tensor:
        return torch.arange(6.0).reshape(2, 3) + 10 * source + side

    assert torch.equal(open_clip.neighbour_exchange(left, right, of(rank, 0), group), of(left, 0))
    from_right, from_left = open_clip.neighbour_exchange_bidir(left, right, of(rank, 0.25), of(rank, 0.5), group)
    assert torch.equal(from_right, of(right, 0.25)) and torch.equal(from_left, of(left, 0.5))

    # Every rank multiplies what it receives by its rank + 1, so the sender's gradient must be the receiver's rank + 1.
    sent = of(rank, 0).requires_grad_()
    (open_clip.neighbour_exchange_with_grad(left, right, sent, group) * (rank + 1)).sum().backward()
    assert torch.equal(sent.grad, torch.full((2, 3), float(right + 1)))
    to_left, to_right = of(rank, 0.25).requires_grad_(), of(rank, 0.5).requires_grad_()
    from_right, from_left = open_clip.neighbour_exchange_bidir_with_grad(left, right, to_left, to_right, group)
    (from_right * (rank + 1) + from_left * 100 * (rank + 1)).sum().backward()
    assert torch.equal(to_left.grad, torch.full((2, 3), float(left + 1)))
    assert torch.equal(to_right.grad, torch.full((2, 3), 100.0 * (right + 1)))


def main(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    exchange(rank, world)
    two = dist.new_group([0, 1])  # left and right neighbour are the same rank, so messages must be matched in order
    if rank < 2:
        exchange(rank, 2, two)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
