"""Times InfoNCE on a CPU, forward plus backward, with the arithmetic floor and common alternatives.

`python -m bench.cpu [--quick] [--only one-sided|symmetric|low]` prints a table and writes bench/results/cpu_*.json.
A row's ratio is its median time over the median of the floor in the same run: 3N (one-sided) or 4N (symmetric),
N being one `torch.matmul` of B x D by D x B. Every contender is checked against eager torch before it is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F

import mi_kernels as mk

from . import machine, table

Contenders = dict[str, Callable[[], torch.Tensor]]


def inputs(batch: int, depth: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(batch, depth, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    return draw(), draw()


def one_sided(query: torch.Tensor, key: torch.Tensor, compiled: bool) -> Contenders:
    labels = torch.arange(len(query))

    def normal() -> tuple[torch.Tensor, torch.Tensor]:
        return F.normalize(query, dim=-1), F.normalize(key, dim=-1)

    def eager(a: torch.Tensor = query, b: torch.Tensor = key) -> torch.Tensor:
        return F.cross_entropy(F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.1, labels)

    def chunked() -> torch.Tensor:
        q, k = normal()
        return F.linear_cross_entropy(q / 0.1, k, labels, options=torch.nn.LinearCrossEntropyOptions())

    def linear() -> torch.Tensor:
        q, k = normal()
        return F.linear_cross_entropy(q / 0.1, k, labels)

    found: Contenders = {"eager": eager, "mi_kernels": lambda: mk.info_nce(query, key, temperature=0.1)}
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = linear
        found["linear_cross_entropy, chunked"] = chunked
    try:
        from info_nce import info_nce as peer

        found["info-nce-pytorch"] = lambda: peer(query, key, temperature=0.1)
    except ImportError:
        pass
    if compiled:
        torch._dynamo.reset()  # every size gets a program of its own; past eight torch would fall back to eager
        program = torch.compile(eager, dynamic=False)
        found["torch.compile"] = lambda: program(query, key)
    return found


def symmetric(query: torch.Tensor, key: torch.Tensor, compiled: bool) -> Contenders:
    labels = torch.arange(len(query))

    def eager(a: torch.Tensor = query, b: torch.Tensor = key) -> torch.Tensor:
        scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.1
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2

    def ours(budget: int) -> torch.Tensor:
        return mk.info_nce(query, key, temperature=0.1, symmetric=True, memory_budget=budget)

    found: Contenders = {
        "eager": eager,
        "mi_kernels": lambda: ours(0),
        "mi_kernels, scores kept": lambda: ours(8 * len(query) ** 2),
    }
    if compiled:
        torch._dynamo.reset()  # every size gets a program of its own; past eight torch would fall back to eager
        program = torch.compile(eager, dynamic=False)
        found["torch.compile"] = lambda: program(query, key)
    return found


def check(name: str, loss: torch.Tensor, gradient: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    tolerance = 3e-2 if gradient.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium" else 1e-4
    if abs(loss - want[0]) > tolerance * abs(want[0]) or (gradient - want[1]).norm() > tolerance * want[1].norm():
        raise RuntimeError(f"{name} does not compute the loss that eager torch computes; no time is taken")


def measure(
    kind: str, batch: int, depth: int, seconds: float, dtype: torch.dtype = torch.float32, only: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    query, key = inputs(batch, depth, dtype)
    compiled = not only and dtype == torch.float32
    contenders = (one_sided if kind == "one-sided" else symmetric)(query, key, compiled)
    contenders = {name: f for name, f in contenders.items() if not only or name in only}
    reference = contenders["eager"]()
    want = reference.detach(), torch.autograd.grad(reference, query)[0]

    def step(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            query.grad = key.grad = None
            function().backward()

        return run

    a, b = torch.randn(batch, depth, dtype=dtype), torch.randn(batch, depth, dtype=dtype)
    steps: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ b.T}
    for name, function in list(contenders.items()):
        try:
            value = function()
            check(name, value.detach(), torch.autograd.grad(value, query)[0], want)
        except Exception as error:
            table.left_out(kind, {"B": batch, "D": depth}, name, error)
            continue
        steps[name] = step(function)
    factor = 3 if kind == "one-sided" else 4
    size = {
        "B": batch,
        "D": depth,
        "dtype": str(dtype).removeprefix("torch."),
        "precision": torch.get_float32_matmul_precision(),
    }
    flop = factor * 2.0 * batch**2 * depth
    return table.rows(kind, size, steps, "matmul", seconds, times_base=factor, base_name=f"{factor}N", flop=flop)


SIZES = ((64, 64), (128, 128), (256, 128), (512, 128), (1024, 128), (2048, 128), (4096, 128), (4096, 512), (8192, 128))
NOTE = (
    "forward plus backward with normalisation; the base is 3N (one-sided) or 4N torch matmuls of the same shape, N = "
    f"2 B^2 D FLOP; gflops counts the base's FLOP; {table.COLUMNS}"
)


def _at_precision(precision: str, query: torch.Tensor, key: torch.Tensor, both: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    mk.info_nce(query, key, temperature=0.1, symmetric=both).backward()
    torch.set_float32_matmul_precision("highest")


def low_precision(seconds: float) -> list[dict[str, Any]]:
    """fp32 inputs under matmul precision "medium", and bf16 inputs, beside fp32 in the same run."""
    rows = []
    for kind in ("one-sided", "symmetric"):
        for batch, depth in ((1024, 128), (4096, 128), (4096, 512)):
            query, key = inputs(batch, depth)
            short = [t.detach().bfloat16().requires_grad_() for t in (query, key)]

            both = kind == "symmetric"
            steps = {
                "fp32": partial(_at_precision, "highest", query, key, both),
                "medium": partial(_at_precision, "medium", query, key, both),
                "bf16 inputs": partial(_at_precision, "highest", *short, both),
            }
            for step in steps.values():
                step()
            times = machine.interleaved(steps, seconds)
            base = statistics.median(times["fp32"])
            for name in ("medium", "bf16 inputs"):
                median, low, high = machine.quantiles(times[name])
                rows.append(
                    {
                        "loss": kind,
                        "B": batch,
                        "D": depth,
                        "contender": name,
                        "speed_over_fp32": round(base / median, 3),
                        "quartiles": [round(base / high, 3), round(base / low, 3)],
                        "milliseconds": round(1e3 * median, 3),
                    }
                )
                print(f"{kind:9s} B={batch} D={depth} {name}: {base / median:.2f} times the speed of fp32", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small sizes, nothing is written")
    parser.add_argument("--only", choices=("one-sided", "symmetric", "low"))
    parser.add_argument("--seconds", type=float, default=4.0, help="per size")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    sizes = SIZES[:4] if arguments.quick else SIZES
    for kind in ("one-sided", "symmetric"):
        if arguments.only in (None, kind):
            rows = [row for b, d in sizes for row in measure(kind, b, d, 0.5 if arguments.quick else arguments.seconds)]
            if not arguments.quick:
                machine.write(f"cpu_info_nce_{kind.replace('-', '_')}", rows, NOTE)
    if arguments.only in (None, "low") and not arguments.quick:
        machine.write(
            "cpu_info_nce_low_precision",
            low_precision(arguments.seconds),
            "16-bit tiles with fp32 accumulation over fp32 tiles, medians of interleaved runs",
        )
    print("bench.cpu: done")


if __name__ == "__main__":
    main()
