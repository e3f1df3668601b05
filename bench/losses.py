"""Times the other losses on dot-product scores on a CPU, forward plus backward, with eager torch and torch.compile.

`python -m bench.losses [--quick]` prints a table and writes bench/results/cpu_losses.json. The base is the arithmetic
floor in the same run: torch matmuls of the scores' shape, 3N for losses separable by rows or by pairs, 4N for symmetric
ones. Every contender is checked against the eager formula in fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk

from . import machine, table

Loss = Callable[[Tensor, Tensor], Tensor]
CLASSES = 20


def _labels(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) % CLASSES


def clip_eager(a: Tensor, b: Tensor) -> Tensor:
    scores, labels = 10 * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def siglip_eager(a: Tensor, b: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -F.logsigmoid(signs * (10 * a @ b.T - 10)).sum() / len(a)


def nt_xent_eager(a: Tensor, b: Tensor) -> Tensor:
    views = F.normalize(torch.cat([a, b]), dim=-1)
    scores = (views @ views.T / 0.5).masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views)).roll(len(a)))


def sup_con_eager(a: Tensor, b: Tensor) -> Tensor:
    views = torch.cat([a, b])
    labels = _labels(len(a), a.device).repeat(2)
    own = torch.eye(len(views), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~own
    scores = views @ views.T / 0.07
    log_probability = scores - scores.masked_fill(own, -torch.inf).logsumexp(-1, keepdim=True)
    return -((log_probability * positive).sum(-1) / positive.sum(-1)).mean()


def rows_eager(a: Tensor, b: Tensor) -> Tensor:
    scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.1
    return (F.cross_entropy(scores, torch.arange(len(a)), reduction="none") * torch.linspace(0, 1, len(a))).sum()


def rows_ours(a: Tensor, b: Tensor) -> Tensor:
    return (mk.info_nce(a, b, temperature=0.1, reduction="none") * torch.linspace(0, 1, len(a))).sum()


def _sup_con(a: Tensor, b: Tensor) -> Tensor:
    return mk.sup_con(torch.stack([a, b], 1), _labels(len(a), a.device))


# name: ours, eager torch, the floor in N, rows of the scores over those of an input
CASES: dict[str, tuple[Loss, Loss, int, int]] = {
    "clip_loss": (lambda a, b: mk.clip_loss(a, b, 10.0), clip_eager, 4, 1),
    "siglip_loss": (lambda a, b: mk.siglip_loss(a, b, 10.0, -10.0), siglip_eager, 3, 1),
    "nt_xent": (mk.nt_xent, nt_xent_eager, 3, 2),
    "sup_con": (_sup_con, sup_con_eager, 3, 2),
    'info_nce, reduction="none"': (rows_ours, rows_eager, 3, 1),
}


def check(name: str, loss: Loss, exact: Loss, a: Tensor, b: Tensor) -> None:
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    got, want = torch.autograd.grad(loss(a, b), [a, b]), torch.autograd.grad(exact(*wide), wide)
    if any((g - w).norm() > 1e-3 * w.norm() for g, w in zip(got, want, strict=True)):
        raise RuntimeError(f"{name} does not have the gradients of the fp64 formula; no time is taken")


def measure(kind: str, batch: int, depth: int, seconds: float) -> list[dict[str, Any]]:
    ours, eager, factor, views = CASES[kind]
    generator = torch.Generator().manual_seed(0)
    draw = lambda: F.normalize(torch.randn(batch, depth, generator=generator), dim=-1).requires_grad_()  # noqa: E731
    a, b = draw(), draw()
    torch._dynamo.reset()
    contenders = {"mi_kernels": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}

    def step(loss: Loss) -> None:
        a.grad = b.grad = None
        loss(a, b).backward()

    rows = views * batch
    x, y = torch.randn(rows, depth), torch.randn(rows, depth)
    steps: dict[str, Callable[[], Any]] = {"matmul": lambda: x @ y.T}
    for name, loss in contenders.items():
        try:
            check(name, loss, eager, a, b)
        except Exception as error:
            table.left_out(kind, {"B": batch, "D": depth}, name, error)
            continue
        steps[name] = partial(step, loss)
    flop = factor * 2.0 * rows**2 * depth
    size = {"B": batch, "D": depth}
    return table.rows(kind, size, steps, "matmul", seconds, times_base=factor, base_name=f"{factor}N", flop=flop)


NOTE = (
    "forward plus backward, fp32, B pairs of D features (nt_xent and sup_con score 2 B views); the base is 3N or 4N "
    f"torch matmuls of the scores' shape; gflops counts the base's FLOP; {table.COLUMNS}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small size, nothing is written")
    parser.add_argument("--seconds", type=float, default=3.0, help="per size")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    sizes = ((64, 32),) if arguments.quick else ((256, 128), (1024, 128), (2048, 512))
    seconds = 0.3 if arguments.quick else arguments.seconds
    found = [row for kind in CASES for b, d in sizes for row in measure(kind, b, d, seconds)]
    if not arguments.quick:
        machine.write("cpu_losses", found, NOTE)
    print("bench.losses: done")


if __name__ == "__main__":
    main()
