"""Swap a CLIP loss under DistributedDataParallel: every rank's pairs are negatives on every other rank.

    python examples/clip_ddp.py                                       # starts two gloo processes on this CPU
    python examples/clip_ddp.py --schedule ring                       # features pass from rank to rank instead
    torchrun --nproc-per-node 2 examples/clip_ddp.py                  # the same under torchrun

Two ranks with 256 pairs each train as one process with 512 does: value and gradients agree to rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy_pairs import Encoders, pairs, retrieval

import mi_kernels as mk


def train(options: argparse.Namespace) -> None:
    """Trains on one rank. Every rank draws the same rows and keeps its own share of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Encoders())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    image, text = pairs(8 * options.batch, seed=0)
    for step in range(options.steps):
        rows = torch.randint(len(image), (options.batch,))[rank::world]
        features = model(image[rows], text[rows])
        loss = mk.distributed.clip_loss(*features, schedule=options.schedule)  # the line that changes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # The loss of a rank covers its own anchors; the mean over the ranks is the loss of the whole batch.
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        if rank == 0 and (step % 25 == 0 or step == options.steps - 1):
            print(f"step {step:4d}  loss {whole.item() / world:.4f}", flush=True)
    if rank == 0:
        found = retrieval(model.module)
        print(f"{world} processes, {options.schedule}: {found:.0%} of 500 unseen images find their text")


def start(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    train(options)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--schedule", choices=("gather", "ring"), default="gather")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=512, help="pairs of all ranks together")
    options = parser.parse_args()
    if "RANK" in os.environ:  # torchrun has started this process and its siblings
        dist.init_process_group("gloo")
        train(options)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(start, (options, f"{folder}/store"), nprocs=options.processes)


if __name__ == "__main__":
    main()
