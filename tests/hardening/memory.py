"""Resident memory over many steps: `python -m tests.hardening.memory --steps 10000 [--training]`.

A step runs every operator, on different rows than the previous step. With --training it is a training step (new rows
and Adam included) of InfoNCE, of SMILE with a concat critic, and of CLUB. Prints MiB after every tenth of the steps;
exits with status 1 if memory grew by more than --allowed MiB in the second half.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys

import torch

from tests.hardening import loads


def resident_mib() -> float:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def profile(steps: int, points: int = 10, training: bool = False) -> list[float]:
    """Resident MiB after every tenth (or 1 / points) of the steps, which alternate between two seeds."""
    every = [list((loads.training if training else loads.steps)(seed).values()) for seed in range(2)]
    found = []
    for point in range(points):
        for k in range(steps // points):
            for step in every[k % 2]:
                step()
        gc.collect()
        found.append(resident_mib())
        print(f"{(point + 1) * (steps // points)} steps: {found[-1]:.1f} MiB", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--allowed", type=float, default=2.0, help="MiB")
    parser.add_argument("--training", action="store_true", help="training steps of three losses")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    found = profile(options.steps, training=options.training)
    grown = found[-1] - found[len(found) // 2 - 1]
    print(f"grown by {grown:.2f} MiB in the second half")
    return int(grown > options.allowed)


if __name__ == "__main__":
    sys.exit(main())
