"""Times Gaussian CLUB, squared MMD and HSIC on a CPU, forward plus backward, with common alternatives.

`python -m bench.club [--quick] [--only club|mmd|hsic]` prints a table and writes bench/results/cpu_club.json,
cpu_mmd.json and cpu_hsic.json. CLUB's base is its closed form in eager torch; MMD's is its matmuls: three for the Gram
matrices and one for each product with a gradient, four when both samples have gradients, two when one has (as with a
sampled prior); HSIC's are two Gram matrices, formed twice, and two products. Every contender is checked against the
fp64 formula before it is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

from . import machine, table

Loss = Callable[..., Tensor]
PAIRS_LIMIT = 512 << 20  # bytes of a B x B x D tensor beyond which the public formulations are left out


def club_pairs(mu: Tensor, logvar: Tensor, y: Tensor) -> Tensor:
    """The public formulation: B x B x D."""
    positive = -((mu - y) ** 2) / 2.0 / logvar.exp()
    negative = -((y.unsqueeze(0) - mu.unsqueeze(1)) ** 2).mean(dim=1) / 2.0 / logvar.exp()
    return (positive.sum(dim=-1) - negative.sum(dim=-1)).mean()


def club_closed(mu: Tensor, logvar: Tensor, y: Tensor) -> Tensor:
    centre = y.mean(0)
    c, m = y - centre, mu - centre
    return ((c.square().mean(0) - c.square() + 2 * m * c) / (2 * logvar.exp())).sum(-1).mean()


def _bandwidth(x: Tensor) -> float:
    return float((2 * x.shape[-1]) ** 0.5)


def mmd_pairs(x: Tensor, y: Tensor) -> Tensor:
    """The public formulation: B x B x D for each of three kernels."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a.unsqueeze(1) - b.unsqueeze(0)).pow(2).sum(2) / (2 * _bandwidth(x) ** 2))

    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def mmd_gram(x: Tensor, y: Tensor) -> Tensor:
    """Three B x B matrices from inner products."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * (a @ b.T)
        return torch.exp(-distance.clamp(min=0) / (2 * _bandwidth(x) ** 2))

    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def mmd_ours(x: Tensor, y: Tensor) -> Tensor:
    return mk.mmd(x, y, bandwidth=_bandwidth(x))


def hsic_gram(x: Tensor, y: Tensor) -> Tensor:
    """Two B x B kernels, centred; unnormalised."""

    def centred(a: Tensor) -> Tensor:
        squares = a.square().sum(-1)
        k = torch.exp(-(squares[:, None] + squares - 2 * (a @ a.T)).clamp(min=0) / (2 * _bandwidth(x) ** 2))
        return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()

    return (centred(x) * centred(y)).mean()


def hsic_ours(x: Tensor, y: Tensor) -> Tensor:
    return mk.hsic(x, y, bandwidth=_bandwidth(x), normalized=False)


def _gradients(loss: Loss, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*leaves), [t for t in leaves if t.requires_grad])


def check(name: str, loss: Loss, exact: Loss, leaves: list[Tensor]) -> None:
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    got, want = _gradients(loss, leaves), _gradients(exact, wide)
    if any((g - w).norm() > 1e-3 * w.norm() for g, w in zip(got, want, strict=True)):
        raise RuntimeError(f"{name} does not have the gradients of the fp64 formula; no time is taken")


def measure(
    kind: str,
    leaves: list[Tensor],
    contenders: dict[str, Loss],
    exact: Loss,
    base: str,
    floor: Callable[[], Any] | None,
    seconds: float,
) -> list[dict[str, Any]]:
    """Rows of one size. The ratio is over `base`, the median of a contender or of the matmuls of `floor`."""
    batch, depth = leaves[0].shape

    def step(loss: Loss) -> None:
        for t in leaves:
            t.grad = None
        loss(*leaves).backward()

    size = {"B": batch, "D": depth}
    steps: dict[str, Callable[[], Any]] = {} if floor is None else {base: floor}
    for name, loss in contenders.items():
        try:
            check(name, loss, exact, leaves)
        except Exception as error:
            table.left_out(kind, size, name, error)
            continue
        steps[name] = partial(step, loss)
    return table.rows(kind, size, steps, base, seconds)


def _compiled(loss: Loss) -> Loss:
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def _with_pairs(batch: int, depth: int, name: str, loss: Loss) -> dict[str, Loss]:
    return {name: loss} if 4 * batch * batch * depth <= PAIRS_LIMIT else {}


def club(batch: int, depth: int, seconds: float) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(batch, depth, generator=generator).requires_grad_() for _ in range(3)]
    contenders = {
        "closed form, eager": club_closed,
        "mi_kernels": gaussian_club,
        "closed form, torch.compile": _compiled(club_closed),
        **_with_pairs(batch, depth, "public formulation, B x B x D", club_pairs),
    }
    return measure("club", leaves, contenders, club_closed, "closed form, eager", None, seconds)


def mmd(batch: int, depth: int, seconds: float, both: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, depth, generator=generator).requires_grad_()
    y = (torch.randn(batch, depth, generator=generator) + 0.3).requires_grad_(both)
    a, b, s = x.detach(), y.detach().T, torch.randn(batch, batch, generator=generator)
    products = 4 if both else 2

    def floor() -> None:
        for _ in range(3):
            a @ b
        for _ in range(products):
            s @ a

    contenders = {
        "mi_kernels": mmd_ours,
        "inner products, eager": mmd_gram,
        "inner products, torch.compile": _compiled(mmd_gram),
        **_with_pairs(batch, depth, "public formulation, B x B x D", mmd_pairs),
    }
    name = "mmd, both gradients" if both else "mmd, one gradient"
    return measure(name, [x, y], contenders, mmd_gram, f"{3 + products} matmuls", floor, seconds)


def hsic(batch: int, depth: int, seconds: float) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, depth, generator=generator).requires_grad_()
    y = (x.detach().square() + torch.randn(batch, depth, generator=generator)).requires_grad_()
    a, b, s = x.detach(), y.detach().T, torch.randn(batch, batch, generator=generator)

    def floor() -> None:
        for _ in range(4):
            a @ b
        for _ in range(2):
            s @ a

    contenders = {
        "mi_kernels": hsic_ours,
        "inner products, eager": hsic_gram,
        "inner products, torch.compile": _compiled(hsic_gram),
    }
    return measure("hsic", [x, y], contenders, hsic_gram, "6 matmuls", floor, seconds)


CLUB_SIZES = ((64, 20), (144, 64), (256, 128), (1024, 128), (1024, 512), (4096, 512))
MMD_SIZES = ((128, 32), (128, 256), (256, 128), (1024, 128), (4096, 128))
CLUB_NOTE = (
    "forward plus backward to mu, logvar and y in fp32; the base is the closed form in eager torch; the public "
    f"formulation is left out where its B x B x D tensor exceeds 512 MiB; {table.COLUMNS}"
)
MMD_NOTE = (
    "squared MMD, biased, fixed bandwidth sqrt(2 D), fp32, forward plus backward; the base is the matmuls that a Gram "
    "formulation needs: three B x D by D x B, and four (both gradients) or two (one) B x B by B x D; " + table.COLUMNS
)
HSIC_SIZES = ((128, 64), (256, 128), (1024, 128), (4096, 128))
HSIC_NOTE = (
    "HSIC, biased, not normalised, fixed bandwidths sqrt(2 D), fp32, forward plus backward to both; the base is four "
    "B x D by D x B and two B x B by B x D matmuls (the Gram matrices are formed again backward); " + table.COLUMNS
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few sizes, nothing is written")
    parser.add_argument("--only", choices=("club", "mmd", "hsic"))
    parser.add_argument("--seconds", type=float, default=4.0, help="per size")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    seconds = 0.5 if arguments.quick else arguments.seconds
    if arguments.only in (None, "club"):
        sizes = CLUB_SIZES[1:4] if arguments.quick else CLUB_SIZES
        rows = [row for b, d in sizes for row in club(b, d, seconds)]
        if not arguments.quick:
            machine.write("cpu_club", rows, CLUB_NOTE)
    if arguments.only in (None, "mmd"):
        sizes = MMD_SIZES[2:4] if arguments.quick else MMD_SIZES
        rows = [row for b, d in sizes for both in (False, True) for row in mmd(b, d, seconds, both)]
        if not arguments.quick:
            machine.write("cpu_mmd", rows, MMD_NOTE)
    if arguments.only in (None, "hsic"):
        sizes = HSIC_SIZES[:2] if arguments.quick else HSIC_SIZES
        rows = [row for b, d in sizes for row in hsic(b, d, seconds)]
        if not arguments.quick:
            machine.write("cpu_hsic", rows, HSIC_NOTE)
    print("bench.club: done")


if __name__ == "__main__":
    main()
