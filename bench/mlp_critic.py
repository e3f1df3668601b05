"""Times InfoNCE with a concat critic on a CPU, forward plus backward, with the arithmetic floor and common
alternatives.

`python -m bench.mlp_critic [--quick] [--only sizes|groups|memory]` prints tables and writes
bench/results/cpu_mlp_critic.json, cpu_mlp_critic_groups.json and cpu_mlp_critic_memory.json. The floor is 3M, M being
one `torch.matmul` of 2 B^2 H^2 FLOP with the shapes of the second layer, in the same run. Every contender is checked
against the definition in fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk

from . import machine, table

Loss = Callable[[mk.ConcatCritic, Tensor, Tensor], Tensor]
PAIRS_LIMIT = 3 << 30  # bytes of one layer's activations beyond which a contender that keeps them is left out


def public(critic: mk.ConcatCritic, x: Tensor, y: Tensor) -> Tensor:
    """As the public code of FactorCL and CLUB writes it: every pair concatenated."""
    batch = len(x)
    h = torch.cat([x.unsqueeze(1).repeat(1, batch, 1), y.unsqueeze(0).repeat(batch, 1, 1)], 2)
    for k, layer in enumerate(critic.layers):
        h = layer(F.relu(h) if k else h)
    s = h.squeeze(-1)
    return (s.logsumexp(1) - s.diagonal()).mean()


def split(critic: mk.ConcatCritic, x: Tensor, y: Tensor) -> Tensor:
    """The first layer applied to x and y apart; every activation kept."""
    first, *others = critic.layers
    u = x @ first.weight[:, : x.shape[1]].T
    h = u.unsqueeze(1) + (y @ first.weight[:, x.shape[1] :].T + first.bias)
    for layer in others:
        h = layer(F.relu(h))
    s = h.squeeze(-1)
    return (s.logsumexp(1) - s.diagonal()).mean()


def ours(critic: mk.ConcatCritic, x: Tensor, y: Tensor) -> Tensor:
    return -mk.InfoNCE(critic)(x, y)


def at_precision(precision: str, step: Callable[[], None]) -> None:
    torch.set_float32_matmul_precision(precision)
    step()
    torch.set_float32_matmul_precision("highest")


def _problem(batch: int, width: int, hidden: tuple[int, ...], groups: int | None = None) -> tuple[Any, ...]:
    torch.manual_seed(0)
    critic = mk.ConcatCritic(width, width, hidden_dims=hidden, groups=groups, memory_budget=1 << 30)
    lead = () if groups is None else (groups,)
    return critic, *(torch.randn(*lead, batch, width).requires_grad_() for _ in range(2))


def _step(loss: Loss, critic: mk.ConcatCritic, x: Tensor, y: Tensor) -> None:
    critic.zero_grad()
    x.grad = y.grad = None
    loss(critic, x, y).sum().backward()


def check(name: str, loss: Loss, critic: mk.ConcatCritic, x: Tensor, y: Tensor) -> None:
    """Gradients against split's in fp64, on the first rows."""
    x, y = (t.detach()[:32].requires_grad_() for t in (x, y))
    found = torch.autograd.grad(loss(critic, x, y), [x, *critic.parameters()])
    wide = critic.double()
    try:
        xd, yd = x.detach().double().requires_grad_(), y.detach().double()
        want = torch.autograd.grad(split(wide, xd, yd), [xd, *wide.parameters()])
    finally:
        critic.float()
    # Gradients of weights are differences of nearly equal sums at initialisation.
    largest = max(w.norm() for w in want)
    if any((f - w).norm() > 1e-3 * w.norm() + 1e-5 * largest for f, w in zip(found, want, strict=True)):
        raise RuntimeError(f"{name} does not have the gradients of the definition; no time is taken")


def sizes(batch: int, hidden: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """One critic: ours in fp32, with bits recomputed, and in 16-bit tiles; public, split and compiled."""
    critic, x, y = _problem(batch, 128, hidden)
    size = {"B": batch, "critic": [256, *hidden, 1]}
    contenders: dict[str, Loss] = {"mi_kernels": ours}
    if 4 * batch * batch * hidden[0] <= PAIRS_LIMIT:
        torch._dynamo.reset()
        contenders["split first layer, eager"] = split
        contenders["split first layer, torch.compile"] = torch.compile(split, dynamic=False)
        if batch <= 512:
            contenders["public formulation"] = public
    steps: dict[str, Callable[[], Any]] = {}
    if len(hidden) == 2:
        a, b = torch.randn(batch * batch, hidden[0]), torch.randn(hidden[1], hidden[0])
        steps["matmul"] = lambda: a @ b.T
    for name, loss in contenders.items():
        try:
            check(name, loss, critic, x, y)
        except Exception as error:
            table.left_out("concat", size, name, error)
            continue
        steps[name] = partial(_step, loss, critic, x, y)
    steps["mi_kernels, medium precision"] = partial(at_precision, "medium", steps["mi_kernels"])
    small = mk.ConcatCritic(128, 128, hidden_dims=hidden, memory_budget=1 << 20)
    small.load_state_dict(critic.state_dict())
    steps["mi_kernels, budget 1 MiB"] = partial(_step, ours, small, x, y)
    if len(hidden) == 1:
        return table.rows("concat", size, steps, "split first layer, eager", seconds)
    flop = 6.0 * batch**2 * hidden[0] * hidden[1]
    return table.rows(
        "concat",
        size,
        steps,
        "matmul",
        seconds,
        times_base=3,
        base_name="3M",
        flop=flop,
        memory=batch <= 512,
        least=5 if batch <= 256 else 3,
    )


def groups(batch: int, seconds: float) -> list[dict[str, Any]]:
    """Six critics in one call beside six calls."""
    together, x, y = _problem(batch, 128, (512, 512), groups=6)
    apart = []
    for g in range(6):
        critic, *_ = _problem(batch, 128, (512, 512))
        critic.load_state_dict({name: p[g] for name, p in together.state_dict().items()})
        apart.append((critic, x.detach()[g].requires_grad_(), y.detach()[g].requires_grad_()))

    def one_by_one() -> None:
        for problem in apart:
            _step(ours, *problem)

    steps: dict[str, Callable[[], Any]] = {"six calls": one_by_one, "one call": partial(_step, ours, together, x, y)}
    return table.rows("six critics", {"B": batch, "critic": [256, 512, 512, 1]}, steps, "six calls", seconds)


def memory(batch: int, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peak memory of one step under a budget for what is kept, at a size that only this formulation can run."""
    found = []
    for budget in budgets:
        critic, x, y = _problem(batch, 128, (512, 512))
        critic.memory_budget = budget
        start = time.perf_counter()
        peak = machine.peak_mebibytes(partial(_step, ours, critic, x, y))
        row = {
            "B": batch,
            "critic": [256, 512, 512, 1],
            "budget_mib": budget >> 20,
            "peak_mib": round(peak, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "activations_mib": 2 * 4 * batch**2 * 512 >> 20,
        }
        found.append(row)
        print(f"memory B={batch} budget {budget >> 20} MiB: {peak:.0f} MiB at the peak", flush=True)
    return found


NOTE = (
    "InfoNCE with a concat critic on 128-d x and y, ReLU, forward plus backward to x, y and all weights, fp32; the "
    "base is 3M with two hidden layers (M: one torch matmul of 2 B^2 H^2 FLOP), and eager torch with a split first "
    f"layer with one; gflops counts 3M; {table.COLUMNS}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--only", choices=("sizes", "groups", "memory"))
    parser.add_argument("--seconds", type=float, default=6.0, help="per size")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    seconds = 1.0 if arguments.quick else arguments.seconds
    if arguments.only in (None, "sizes"):
        batches = (16, 32, 128) if arguments.quick else (16, 32, 64, 128, 256, 512, 1024)
        found = [row for batch in batches for row in sizes(batch, (512, 512), seconds)]
        single = (128,) if arguments.quick else (64, 256)
        found += [row for batch in single for row in sizes(batch, (512,), seconds)]
        if not arguments.quick:
            machine.write("cpu_mlp_critic", found, NOTE)
    if arguments.only in (None, "groups"):
        found = [row for batch in ((32,) if arguments.quick else (32, 64, 128)) for row in groups(batch, seconds)]
        if not arguments.quick:
            machine.write("cpu_mlp_critic_groups", found, NOTE)
    if arguments.only in (None, "memory") and not arguments.quick:
        note = "one step of InfoNCE with the concat critic; budget_mib may hold scores and ReLU bits between forward "
        note += "and backward; activations_mib is what two hidden layers of all pairs would take in fp32"
        machine.write("cpu_mlp_critic_memory", memory(2048, (1 << 20, 64 << 20, 1 << 30)), note)
    print("bench.mlp_critic: done")


if __name__ == "__main__":
    main()
