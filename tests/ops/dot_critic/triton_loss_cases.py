"""Whole losses in Triton's interpreter: both schedules against the definition in fp64, and the number of launches.

tests/triton_checks.py runs this in its own process.
"""

import os
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

import mi_kernels as mk
from mi_kernels.ops.dot_critic import triton_common
from tests.ops.dot_critic import large_scores
from tests.triton_cases import DEVICE, error, prepare, under_autocast


def _ids(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[-2], device=x.device) // 3).expand(x.shape[:-1])


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one-sided": lambda x, y, t: mk.info_nce(x, y, temperature=t.exp()),
    "symmetric": lambda x, y, t: mk.info_nce(x, y, temperature=t.exp(), symmetric=True),
    "not unit": lambda x, y, t: mk.info_nce(x, y, temperature=t.exp(), normalize=False),
    "siglip": lambda x, y, t: mk.siglip_loss(x, y, t.exp(), t - 3.0),
    "siglip, negatives": lambda x, y, t: mk.siglip_loss(x, y, t.exp(), t - 3.0, negative_only=True),
    "nt_xent": lambda x, y, t: mk.nt_xent(x, y, temperature=t.exp()),
    # every score lies hundreds of powers of two below the upper bound on scores
    "opposite": lambda x, y, t: mk.info_nce(
        x.abs() + 0.1, -y.abs() - 0.1, temperature=t.exp() / 200, normalize=False
    ),
    "ids": lambda x, y, t: mk.info_nce(x, y, temperature=t.exp(), query_ids=_ids(x)),
}
SHAPES = ((35, 19), (2, 11, 35))
STORED = ("one-sided", "not unit", "siglip", "siglip, negatives", "nt_xent", "opposite")
# The largest number of launches of a loss and its gradients at B = 40, with unit rows and a number as temperature.
LAUNCHES = {"one-sided": 14, "symmetric": 15}


def run(
    loss: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype, backend: str, autocast: bool = False
) -> list[Tensor]:
    given = [t.to(dtype).requires_grad_() for t in leaves]
    with mk.use_backend(backend), under_autocast(autocast):
        value = loss(*given)
        return [value.detach(), *torch.autograd.grad(value.sum(), given)]


def failures(schedule: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    os.environ["MI_KERNELS_SCHEDULE"] = schedule
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=gen).to(DEVICE, dtype) / 3 for _ in range(2)]
    leaves.append(torch.tensor(0.3, device=DEVICE, dtype=dtype))
    exact = run(LOSSES[name], leaves, torch.float64, "reference")
    plain = run(LOSSES[name], leaves, dtype, "reference")
    got, again = (run(LOSSES[name], leaves, dtype, "triton", autocast) for autocast in (False, True))
    found = ["two runs differ"] if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)) else []
    with torch.no_grad(), mk.use_backend("triton"):
        # without gradients, compiled kernels use other tiles
        if error(LOSSES[name](*leaves), got[0]) > (0.0 if DEVICE.type == "cpu" else 1e-5):
            found.append("the value alone differs")
    # The definition rounds only the result to 16 bits; the kernels also round unit rows and dS, as plain torch does.
    part = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 1e-6
    for what, g, p, e in zip(("value", "dx", "dy"), got, plain, exact, strict=False):
        if not error(g, e) <= 2 * error(p, e) + part:
            found.append(f"{what}: error {error(g, e):.2e}, the definition {error(p, e):.2e}")
    # The scale's gradient is a sum of terms of both signs, so its error is compared with the absolute sum of the terms.
    size = sum(float((g.double() * t.double()).abs().sum()) for g, t in zip(exact[1:3], leaves, strict=False))
    if not abs(float(got[3]) - float(exact[3])) <= (8 * part) * (abs(float(exact[3])) + size):
        found.append(f"dscale: {float(got[3])}, exact {float(exact[3])}")
    return [f"{schedule} {name} {shape} {dtype}: {line}" for line in found]


class _Launches(TorchDispatchMode):
    """Records operators that would start a kernel on a GPU, and Triton's launches."""

    # fill_ is from `prepare`, which poisons memory; resize_ gives outputs the caller's shape; _local_scalar_dense reads
    # the incoming gradient, which happens only on a CPU.
    FREE = (
        *("view", "expand", "slice", "select", "detach", "empty", "alias", "squeeze", "transpose", "permute", "fill_"),
        *("resize_", "_local_scalar_dense"),
    )

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if not any(free in name for free in self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(name: str) -> list[str]:
    """Complaints about the launches of a loss and its gradients in the fused schedule."""
    os.environ["MI_KERNELS_SCHEDULE"] = "fused"
    counter, plain = _Launches(), interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        counter.names.append(f"triton {self.fn.__name__}")
        with _disable_current_modes():
            return plain(self, *args, **kwargs)

    x, y = (torch.randn(40, 16).requires_grad_() for _ in range(2))
    interpreter.GridExecutor.__call__ = call
    try:
        with mk.use_backend("triton"), counter:
            loss = mk.info_nce(x, y, symmetric=name == "symmetric")
            # an incoming gradient other than 1: on a GPU it is not read, so gradients are always multiplied by it
            torch.autograd.grad(loss, (x, y), torch.full_like(loss, 2.0))
    finally:
        interpreter.GridExecutor.__call__ = plain
    return counter.names


def main() -> int:
    prepare()
    launched = {name: launches(name) for name in (LAUNCHES if DEVICE.type == "cpu" else ())}
    triton_common.CHUNK_BYTES, triton_common.LEAST_ROWS = 2 * 50 * 7, 1
    found = []
    short = (torch.bfloat16, torch.float16)
    cases = [("fused", *c) for c in product(LOSSES, SHAPES[:1], (torch.float32, torch.bfloat16))]
    cases += [("fused", "one-sided", SHAPES[1], torch.float16), ("fused", "nt_xent", SHAPES[1], torch.float32)]
    # every loss with both shapes, and with both 16-bit types
    cases += [("stored", name, SHAPES[(i + j) % 2], t) for i, name in enumerate(STORED) for j, t in enumerate(short)]
    cases += [("stored", name, shape, torch.float32) for name, shape in zip(STORED, SHAPES * 3, strict=True)]
    for case in cases:
        found += failures(*case)
    large = [(schedule, name) for schedule in ("fused", "stored") for name in large_scores.CALLS]
    for schedule, name in large:
        os.environ["MI_KERNELS_SCHEDULE"] = schedule
        if not (off := large_scores.error(name, "triton")) <= 2e-6:
            found.append(f"{schedule} {name} about a large common score: error {off:.1e}")
    for name, names in launched.items():
        if len(names) > LAUNCHES[name]:
            found.append(f"{name}: {len(names)} launches: {', '.join(names)}")
    print(*found, sep="\n", end="\n" if found else "")
    print(f"dot_critic losses: {len(cases) + len(large)} interpreter cases, {len(found)} failures")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
