"""The package's own two uses for the demo's page, measured while it is written: a swapped loss, and an MI estimate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mi_kernels as mk
from models.report import page

BATCHES = (256, 512, 1024, 2048)
DIM, TEMPERATURE = 64, 0.1


class Cost(NamedTuple):
    """Median seconds of forward plus backward, and the bytes that autograd keeps between them."""

    seconds: float
    kept: int


def eager(x: Tensor, y: Tensor) -> Tensor:
    """NT-Xent as its public implementations write it: 2 B x 2 B similarities, the diagonal masked."""
    z = torch.nn.functional.normalize(torch.cat([x, y]), dim=1)
    scores = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(z)).roll(len(x)))


def fused(x: Tensor, y: Tensor) -> Tensor:
    unit = [torch.nn.functional.normalize(t, dim=1) for t in (x, y)]
    return mk.nt_xent(unit[0], unit[1], TEMPERATURE)


def cost(loss: Callable[[Tensor, Tensor], Tensor], batch: int, repetitions: int = 3) -> Cost:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(batch, DIM, generator=generator).requires_grad_() for _ in range(2))
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(x, y).backward()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        loss(x, y).backward()
        seconds.append(time.perf_counter() - start)
    return Cost(statistics.median(seconds), sum(storages.values()))


def swapped_loss(batches: tuple[int, ...] = BATCHES) -> str:
    """A section: NT-Xent in eager torch and by mk.nt_xent, time and memory against batch size."""
    rows = []
    for batch in batches:
        ours, theirs = cost(fused, batch), cost(eager, batch)
        rows.append(
            [
                f"{batch}",
                f"{theirs.seconds * 1e3:.1f}",
                f"{ours.seconds * 1e3:.1f}",
                f"{theirs.kept / 2**20:.1f}",
                f"{ours.kept / 2**20:.1f}",
            ]
        )
    header = ["batch", "eager torch, ms", "mi_kernels, ms", "eager torch, MiB kept", "mi_kernels, MiB kept"]
    note = (
        f"NT-Xent of two views with {DIM} features, forward plus backward, median of 3 on {torch.get_num_threads()} "
        "threads; the memory is what autograd keeps between the two passes, each storage counted once."
    )
    return page.section("Use 1: the same loss, swapped", page.table(header, rows), note)


def estimate(samples: int = 2000, max_steps: int = 600) -> str:
    """A section: mk.estimate_mi with its interval on Gaussians whose mutual information is known."""
    rows = []
    for truth in (0.5, 2.0):
        x, y = mk.tasks.gaussian(truth, 3).sample(samples, 0)
        found = mk.estimate_mi(x, y, max_steps=max_steps, progress=False)
        low, high = found.value - 1.96 * found.standard_error, found.value + 1.96 * found.standard_error
        rows.append([f"{truth:.2f}", f"{found.value:.2f}", f"{low:.2f} to {high:.2f}"])
    note = f"Nats; {samples} samples of two vectors of 3 dimensions. The interval is the value ± 1.96 standard errors."
    table = page.table(["truth", "estimate", "95 % interval"], rows)
    return page.section("Use 2: mutual information with its interval", table, note)
