"""InfoNCE over the ranks: a cost model of both schedules, on paper for large clusters and held against gloo processes.

`python -m bench.ring` starts 2, 3 and 4 processes of one thread each, measures what the model needs (seconds of a block
forward and backward while all ranks compute, latency and bandwidth of a transfer to the next rank while all ranks send)
and then the loss with its gradients, gathered and as a ring. It prints measured and predicted times and writes
bench/results/ring.json. More processes than cores share them, which the measured rates contain.
`python -m bench.ring --paper` prints the model alone, for GPUs: bytes a link and step, memory, and where the ring hides
its transfers.

One loss, B rows a rank and W ranks, D features, s bytes a number; a block is B x B scores:

    gather   W blocks at 6 B^2 D FLOP; (W - 1) B D s bytes a link forward, as many backward (twice with gloo, which sums
             all shards on every rank); W B D s bytes of memory
    ring     W blocks at 2 B^2 D FLOP forward and 6 backward; a step of the ring sends B D s bytes forward, and backward
             B D (s + 4): columns and their fp32 gradient; three shards of memory
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.common.checks import backend_name
from mi_kernels.ops.dot_critic.schema import ALL, NEED_X, NEED_Y, ROW_LSE
from models.training.distributed import launch

from . import machine

WORLDS = (2, 3, 4)
SIZES = ((256, 128), (1024, 128), (2048, 256))
TEMPERATURE = 0.1
NOTE = (
    "seconds: the slowest rank's median of a loss with its gradients; predicted: the cost model of bench/ring.py from "
    "the block and transfer times that were measured in the same processes, which block and link give; over_predicted "
    "is their quotient; link_bytes: what a rank sends to the next one"
)


class Block(NamedTuple):
    """Seconds that a rank computes on B x B scores: `fused` is loss and gradients at once, as gather computes them."""

    forward: float
    backward: float
    fused: float


class Link(NamedTuple):
    """Seconds to start a transfer to the next rank, and bytes a second."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


class Cost(NamedTuple):
    seconds: float
    link_bytes: float  # sent by every rank to the next one
    memory: float  # bytes of features and their gradients beyond the rank's own


def gather_cost(world: int, rows: int, width: int, size: int, block: Block, link: Link, backward: int = 1) -> Cost:
    """backward: how often a shard travels for the gradient, 1 where shards are summed at their owner and 2 for gloo."""
    shard = rows * width * size
    transfers = (world - 1) * (1 + backward)
    return Cost(transfers * link.seconds(shard) + world * block.fused, transfers * shard, 2 * world * shard)


def ring_cost(world: int, rows: int, width: int, size: int, block: Block, link: Link) -> Cost:
    """A step takes the longer of its block and its transfers; the last gradient goes home with nothing to hide it."""
    shard, gradient = rows * width * size, rows * width * 4
    forward = (world - 1) * max(block.forward, link.seconds(shard)) + block.forward
    backward = (world - 1) * max(block.backward, link.seconds(shard + gradient)) + block.backward
    sent = (world - 1) * (2 * shard + gradient) + gradient
    return Cost(forward + backward + link.seconds(gradient), sent, 2 * (shard + gradient))


def hidden_from(flops: float, bandwidth: float, size: int) -> tuple[float, float]:
    """Rows a rank from which the ring's transfers are hidden, forward and backward, whatever the width and the world:
    2 B^2 D / flops >= B D s / bandwidth, and 6 B^2 D / flops >= B D (s + 4) / bandwidth."""
    return size * flops / (2 * bandwidth), (size + 4) * flops / (6 * bandwidth)


# Dense bf16 at half of an H100's peak; bytes a second to the next GPU within a node and between nodes (400 Gb/s a GPU).
PAPER_FLOPS = 400e12
PAPER_LINKS = {"NVLink": Link(5e-6, 300e9), "InfiniBand": Link(10e-6, 45e9)}


def paper(world: int = 512, width: int = 512, size: int = 2) -> list[dict[str, Any]]:
    """One loss on `world` GPUs: per link the rows from which the ring hides its transfers, and both costs."""
    found = []
    for name, link in PAPER_LINKS.items():
        for rows in (256, 1024, 4096, 16384):
            unit = 2 * rows**2 * width / PAPER_FLOPS
            block = Block(unit, 3 * unit, 3 * unit)
            costs = {"gather": gather_cost, "ring": ring_cost}
            for schedule, cost in costs.items():
                c = cost(world, rows, width, size, block, link)
                row = {"link": name, "rows": rows, "schedule": schedule, "seconds": c.seconds}
                steps = (world - 1) * (2 if schedule == "gather" else 1)
                row |= {"link_bytes": c.link_bytes, "bytes_a_step": c.link_bytes / steps, "memory": c.memory}
                found.append(
                    row | {"hidden_from": " ".join(f"{n:.0f}" for n in hidden_from(PAPER_FLOPS, link.bandwidth, size))}
                )
    return found


def median(function: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call that all ranks make together: they take the same number of turns."""
    function()
    taken: list[float] = []
    end = torch.tensor(time.perf_counter() + seconds)
    while True:
        dist.barrier()
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
        go_on = torch.tensor(int(time.perf_counter() < end or len(taken) < 5))
        dist.broadcast(go_on, 0)
        if not go_on:
            break
    found = torch.tensor(statistics.median(taken))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def features(rows: int, width: int) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    x, y = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(rank))
    return x.requires_grad_(), y.requires_grad_()


def step(x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    value = loss(x, y, temperature=TEMPERATURE)
    torch.autograd.grad(value, (x, y))
    return value.detach()


def block_times(rows: int, width: int, seconds: float) -> Block:
    """Of this rank's own B x B block, while the other ranks compute theirs."""
    x, y = features(rows, width)
    a, b, scale = x.detach()[None], y.detach()[None], torch.tensor([1 / TEMPERATURE])
    problem, pairs, backend = (a, b, scale, None, None, None, None), (ALL, -1), backend_name(None)
    dot = torch.ops.mi_kernels
    lse = dot.dot_critic_stats(*problem, *pairs, ROW_LSE, math.inf, backend)[0]
    known, g = (lse, None), torch.full_like(lse, 1 / rows)
    forward = partial(dot.dot_critic_stats, *problem, *pairs, ROW_LSE, math.inf, backend)
    backward = partial(
        dot.dot_critic_grad, *problem, *pairs, *known, g, None, None, None, False, NEED_X | NEED_Y, backend
    )
    fused = partial(step, x, y, partial(mk.info_nce, normalize=False))
    return Block(median(forward, seconds), median(backward, seconds), median(fused, seconds))


def link_of(seconds: float) -> Link:
    """From transfers of two sizes that all ranks make at once."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def pass_on(t: Tensor) -> None:
        moves = [
            dist.P2POp(dist.isend, t, (rank + 1) % world),
            dist.P2POp(dist.irecv, torch.empty_like(t), (rank - 1) % world),
        ]
        for work in dist.batch_isend_irecv(moves):
            work.wait()

    small, large = torch.zeros(16), torch.zeros(1 << 20)
    latency, long = median(partial(pass_on, small), seconds), median(partial(pass_on, large), seconds)
    return Link(latency, 4 * large.numel() / max(long - latency, 1e-9))


def measure(path: Path, world: int, sizes: tuple[tuple[int, int], ...], seconds: float) -> None:
    """In each of the processes; rank 0 writes the rows to ``path``."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    link, rows = link_of(seconds), []
    for number, width in sizes:
        x, y = features(number, width)
        losses = {s: partial(mk.distributed.info_nce, normalize=False, schedule=s) for s in ("gather", "ring")}
        values = [step(x, y, loss) for loss in losses.values()]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        block = block_times(number, width, seconds)
        costs = {
            "gather": gather_cost(world, number, width, 4, block, link, backward=2),
            "ring": ring_cost(world, number, width, 4, block, link),
        }
        for schedule, loss in losses.items():
            taken, cost = median(partial(step, x, y, loss), seconds), costs[schedule]
            row = {"world": world, "rows": number, "width": width, "schedule": schedule, "seconds": taken}
            row |= {"predicted": cost.seconds, "over_predicted": taken / cost.seconds, "link_bytes": cost.link_bytes}
            rows.append(row | {"block": block._asdict(), "link": link._asdict()})
    if rank == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


def run(worlds: tuple[int, ...], sizes: tuple[tuple[int, int], ...], seconds: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for world in worlds:
            path = Path(folder) / f"{world}.json"
            launch(measure, (path, world, sizes, seconds), world)
            rows += json.loads(path.read_text())
    return rows


def show(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    print("  ".join(f"{name:>14}" for name in columns))
    for row in rows:
        print("  ".join(f"{format(row[name], form):>14}" for name, form in columns.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--paper", action="store_true", help="the model alone, for GPUs")
    parser.add_argument("--world", type=int, default=512, help="GPUs of --paper")
    parser.add_argument("--quick", action="store_true", help="one small size on 2 processes; writes nothing")
    args = parser.parse_args()
    if args.paper:
        columns = {"link": "", "rows": "d", "schedule": "", "seconds": ".2e", "link_bytes": ".2e"}
        rows = paper(args.world)
        show(rows, columns | {"bytes_a_step": ".2e", "memory": ".2e", "hidden_from": ""})
        return
    rows = run((2,), SIZES[:1], 0.2) if args.quick else run(WORLDS, SIZES, 3.0)
    columns = {"world": "d", "rows": "d", "width": "d", "schedule": "", "seconds": ".2e", "predicted": ".2e"}
    show(rows, columns | {"over_predicted": ".2f"})
    if not args.quick:
        print(machine.write("ring", rows, NOTE))


if __name__ == "__main__":
    main()
