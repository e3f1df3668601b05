"""The Gaussian kernel sums in Triton's interpreter, against autograd through formulas over all pairs in fp64.

tests/triton_checks.py runs this in its own process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from mi_kernels.ops.rbf import api, triton_common
from tests.triton_cases import DEVICE, prepare, under_autocast, worse


@dataclass(frozen=True)
class Case:
    x: tuple[int, ...] = (1, 37, 5)
    y: tuple[int, ...] = (1, 45, 5)
    kernels: int = 1
    weights: tuple[float, float, float] = (0.02, 0.015, -0.04)
    wanted: tuple[str, ...] = ("x", "y", "bandwidth")
    dtype: torch.dtype = torch.float32
    programs: int = 512
    equal_rows: bool = False
    flat: bool = False  # kernel values near 1: e = k - 1 has all the digits
    spread: bool = False  # kernel values far below 1: k = e + 1 would have few digits
    far: float = 0.0


MMD = (
    [Case(x=a, y=b, kernels=k) for a, b, k in (
        ((1, 1, 1), (1, 1, 1), 1), ((2, 33, 7), (2, 18, 7), 3), ((1, 64, 32), (1, 32, 32), 2),
        ((3, 5, 33), (3, 4, 33), 1),
        ((1, 70, 40), (1, 33, 40), 2), ((1, 20, 3), (1, 0, 3), 1), ((2, 40, 35), (2, 0, 35), 5),
    )]
    + [Case(wanted=w) for w in (("x",), ("y",), ("bandwidth",), ())]
    + [Case(x=(1, 50, 40), y=(1, 41, 40), wanted=w) for w in (("x",), ("y", "bandwidth"), ())]
    + [Case(x=(1, 90, 4), y=(1, 70, 4), programs=p, wanted=w) for p in (1, 64) for w in ((), ("x", "bandwidth"))]
    + [Case(equal_rows=True), Case(flat=True), Case(flat=True, wanted=()), Case(spread=True, kernels=2)]
    + [Case(dtype=torch.float64, kernels=2, x=(1, 21, d), y=(1, 18, d)) for d in (3, 34)]
    + [Case(x=(2, 20, 3), y=(2, 17, 3), kernels=2, far=1e4), Case(x=(1, 20, 35), y=(1, 17, 35), far=1e6)]
    + [Case(x=(1, 36, 2), y=(1, 21, 2), far=1e22, wanted=())]
)  # fmt: skip

HSIC = (
    [Case(x=a, y=b) for a, b in (
        ((1, 1, 1), (1, 1, 2)), ((1, 2, 3), (1, 2, 1)), ((2, 33, 7), (2, 33, 4)), ((1, 64, 32), (1, 64, 32)),
        ((1, 45, 40), (1, 45, 3)), ((3, 17, 3), (3, 17, 35)),
    )]
    + [Case(x=(1, 37, 3), y=(1, 37, d), wanted=w) for d in (4, 35) for w in (("x",), ("y",), ("bandwidth",))]
    + [Case(x=(1, 90, 4), y=(1, 90, 2), programs=p) for p in (1, 64)]
    + [Case(x=(1, 30, 4), y=(1, 30, 4), equal_rows=True), Case(x=(1, 40, 4), y=(1, 40, 4), flat=True)]
    + [Case(x=(1, 40, 40), y=(1, 40, 40), spread=True)]
    + [Case(x=(1, 21, 3), y=(1, 21, d), dtype=torch.float64) for d in (3, 34)]
    + [Case(x=(1, 36, 3), y=(1, 36, 2), far=1e4), Case(x=(1, 17, 2), y=(1, 17, 35), far=1e6)]
)  # fmt: skip


def distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


def mmd_formula(case: Case) -> Callable[..., Tensor]:
    def value(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        sums, gamma = [], 0.5 / s.square()
        for a, b in ((x, x), (y, y), (x, y)):
            e = (-gamma[:, :, None, None] * distances(a, b)[:, None]).expm1()
            sums.append(e.mean(1).sum((-2, -1)))
        return sum(w * s for w, s in zip(case.weights, sums, strict=True))

    return value


def hsic_formula(x: Tensor, y: Tensor, sx: Tensor, sy: Tensor) -> Tensor:
    gx, gy = 0.5 / sx.square(), 0.5 / sy.square()
    batch = x.shape[1]
    h = torch.eye(batch, dtype=x.dtype, device=x.device) - 1 / batch
    k, m = (h @ (-g[:, None, None] * distances(t, t)).expm1() @ h for g, t in ((gx, x), (gy, y)))
    return torch.stack([(a * b).sum((-2, -1)) for a, b in ((k, m), (k, k), (m, m))], -1) / batch**2


def inputs(case: Case, seed: int, of_hsic: bool) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    normal = lambda shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    x, y = normal(case.x), normal(case.y)
    if of_hsic:
        y = y + x[..., :1]
    if case.equal_rows:
        x[:, 1:4], y[:, 5] = x[:, :1], y[:, 3]
    if case.far:  # two clusters whose rows alternate, and an outlier
        x[:, ::2] += case.far
        x[:, -1], y[:, -1] = 10 * case.far, -3 * case.far
    size = 0.01 if case.flat else 8.0 if case.spread else 1.0

    def bandwidth(depth: int, *shape: int) -> Tensor:
        return ((0.3 + torch.rand(*shape, generator=gen, dtype=torch.float64)) * size * 2 / depth).rsqrt()

    groups, depth = case.x[0], case.x[2]
    if of_hsic:
        found = {"x": x, "y": y, "bandwidth": bandwidth(depth, groups), "bandwidth_y": bandwidth(case.y[2], groups)}
    else:
        found = {"x": x, "y": y, "bandwidth": bandwidth(depth, groups, case.kernels)}
    return {name: t.to(DEVICE, case.dtype) for name, t in found.items()}


def run(case: Case, tensors: dict[str, Tensor], function: Callable[..., Tensor], dtype: torch.dtype,
        autocast: bool = False) -> dict:  # fmt: skip
    asked = lambda name: name.split("_")[0] in case.wanted  # noqa: E731
    leaves = {n: t.to(dtype).requires_grad_(asked(n)) for n, t in tensors.items()}
    with under_autocast(autocast):
        value = function(*leaves.values())
    wanted = [n for n in leaves if asked(n) and leaves[n].numel()]
    slope = (1 + torch.arange(value.numel(), dtype=value.dtype, device=DEVICE)).reshape(value.shape)
    with under_autocast(autocast):
        found = torch.autograd.grad((value * slope).sum(), [leaves[n] for n in wanted]) if wanted else ()
    return {"value": value.detach(), **dict(zip(wanted, found, strict=True))}


def failures(case: Case, seed: int, of_hsic: bool) -> list[str]:
    triton_common._PROGRAMS = case.programs
    tensors = inputs(case, seed, of_hsic)
    if of_hsic:
        ours, formula = (lambda *a: api.hsic(*a, backend="triton")), hsic_formula
        plain_form = lambda *a: api.hsic(*a, backend="reference")  # noqa: E731
    else:
        ours, formula = (lambda *a: api.mmd(*a, *case.weights, backend="triton")), mmd_formula(case)
        plain_form = lambda *a: api.mmd(*a, *case.weights, backend="reference")  # noqa: E731
    got, again = (run(case, tensors, ours, case.dtype, autocast) for autocast in (False, True))
    exact = run(case, tensors, formula, torch.float64)
    plain = run(case, tensors, plain_form, case.dtype)
    found = [f"{n}: two runs differ" for n in got if not torch.equal(got[n], again[n])]
    for name in got:
        found += worse(name, got[name], plain[name], exact[name])
        if name in tensors and got[name].dtype != tensors[name].dtype:
            found.append(f"{name}: dtype {got[name].dtype}")
    return found


def others() -> list[str]:
    """Further complaints: MMD of a sample with itself must be 0, and NaN must propagate."""
    found = []
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    width = torch.full((1, 1), 1.6, device=DEVICE)
    same = api.mmd(x, x.clone(), width, 1 / 400, 1 / 400, -2 / 400, "triton")
    if abs(same.item()) > 1e-8:
        found.append(f"MMD of a sample with itself is {same.item():.1e}")
    x[0, 7, 1] = torch.nan
    if not api.mmd(x, x.clone(), width, 1.0, 1.0, -2.0, "triton").isnan():
        found.append("a NaN does not show in MMD")
    if not api.hsic(x, x[..., 2:], width[0], width[0], "triton")[..., 0].isnan():
        found.append("a NaN does not show in HSIC")
    return found


def main() -> int:
    prepare()
    triton_common.CHUNK_BYTES = 40 * 100 * 4
    bad = 0
    for of_hsic, cases in ((False, MMD), (True, HSIC)):
        for seed, case in zip(count(), cases, strict=False):
            for line in failures(case, seed, of_hsic):
                bad += 1
                print(f"{'hsic' if of_hsic else 'mmd'} {case}: {line}")
    for line in others():
        bad += 1
        print(line)
    print(f"rbf: {len(MMD) + len(HSIC)} interpreter cases, {bad} failures")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
