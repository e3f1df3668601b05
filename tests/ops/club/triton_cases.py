"""The CLUB bound's Triton kernels in the interpreter, against autograd through the formula over all pairs in fp64.

Run by tests/triton_checks.py in a process of its own.
"""

from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from mi_kernels.ops.club import api, triton
from tests.triton_cases import DEVICE, error, prepare, worse

NAMES = ("mu", "logvar", "y")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (37, 19)
    dtype: torch.dtype = torch.float32
    variances: bool = True
    offset: float = 0.0
    wanted: tuple[str, ...] = NAMES
    slope: float = 1.0
    programs: int = 1024
    sorted: bool = False  # means increase from the first row to the last


CASES = (
    [Case(shape=s, variances=v) for s in ((1, 1), (2, 1), (7, 3), (1, 50), (90, 33)) for v in (True, False)]
    + [Case(shape=s) for s in ((3, 65, 17), (2, 3, 5, 4), (33, 16), (32, 32), (300, 5))]
    + [Case(offset=o, shape=(70, 20), programs=p) for o in (1e4, -3e3) for p in (1, 64)]
    + [Case(offset=1e4, shape=(70, 20), variances=False, programs=p) for p in (1, 64)]
    + [Case(shape=(130, 70), sorted=True, offset=100.0), Case(shape=(130, 6), programs=1)]
    + [Case(wanted=(n,)) for n in NAMES] + [Case(wanted=("mu", "y"), variances=False)]
    + [Case(dtype=torch.float64, shape=(45, 18), variances=v, offset=50.0) for v in (True, False)]
    + [Case(dtype=t, shape=(41, 21), slope=256.0) for t in (torch.bfloat16, torch.float16)]
)  # fmt: skip


def inputs(case: Case, seed: int) -> list[Tensor | None]:
    gen = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(case.shape, generator=gen, dtype=torch.float64)  # noqa: E731
    y = normal()
    if case.sorted:
        y = y + torch.linspace(-50, 50, case.shape[-2])[:, None]
    mu = 0.6 * y + 0.8 * normal() + case.offset
    logvar = 0.7 * normal() if case.variances else None
    return [None if t is None else t.to(DEVICE, case.dtype) for t in (mu, logvar, y + case.offset)]


def pairwise(mu: Tensor, logvar: Tensor | None, y: Tensor) -> Tensor:
    """mean_i [log q(y_i | x_i) - mean_j log q(y_j | x_i)] with a B x B x D intermediate."""
    w = torch.ones_like(mu) if logvar is None else (-logvar).exp()
    apart = (y.unsqueeze(-3) - mu.unsqueeze(-2)).square().mean(-2)
    return ((apart - (y - mu).square()) * w / 2).sum(-1).mean(-1)


def run(case: Case, tensors: list[Tensor | None], function, dtype: torch.dtype) -> dict[str, Tensor]:
    """The value and the requested gradients, with an incoming gradient that differs between groups."""
    given = {n: t for n, t in zip(NAMES, tensors, strict=True) if t is not None}
    leaves = {n: t.to(dtype).requires_grad_(n in case.wanted) for n, t in given.items()}
    value = function(leaves["mu"], leaves.get("logvar"), leaves["y"])
    slope = case.slope * (1 + torch.arange(value.numel(), dtype=value.dtype, device=DEVICE)).reshape(value.shape)
    wanted = [n for n in case.wanted if n in leaves]
    found = torch.autograd.grad((value * slope).sum(), [leaves[n] for n in wanted])
    return {"value": value.detach(), **dict(zip(wanted, found, strict=True))}


def failures(case: Case, seed: int) -> list[str]:
    triton._PROGRAMS = case.programs
    tensors = inputs(case, seed)
    ours = lambda *leaves: api.gaussian_club(*leaves, backend="triton")  # noqa: E731
    got = run(case, tensors, ours, case.dtype)
    again = run(case, tensors, ours, case.dtype)
    exact = run(case, tensors, pairwise, torch.float64)
    plain = run(case, tensors, lambda *a: api.gaussian_club(*a, backend="reference"), case.dtype)
    found = [f"{n}: two runs differ" for n in got if not torch.equal(got[n], again[n])]
    for name in got:
        found += worse(name, got[name], plain[name], exact[name])
    if got["value"].dtype != torch.promote_types(case.dtype, torch.float32):
        found.append(f"value: dtype {got['value'].dtype}")
    return found


def rejections() -> list[str]:
    """Checks that NaN propagates and that second derivatives equal the formula's; returns complaints."""
    mu, logvar, y = inputs(Case(dtype=torch.float64, shape=(6, 3)), 0)
    leaves = [t.requires_grad_() for t in (mu, logvar, y)]
    found = []
    twice = []
    for function in (lambda *a: api.gaussian_club(*a, backend="triton"), pairwise):
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    if any(error(a, b) > 1e-10 for a, b in zip(*twice, strict=True)):
        found.append("second derivatives differ from the formula's")
    with torch.no_grad():
        mu[4, 1] = torch.nan
        if not api.gaussian_club(mu, logvar, y, backend="triton").isnan():
            found.append("a NaN of mu does not show")
    return found


def main() -> int:
    prepare()
    bad = 0
    for seed, case in zip(count(), CASES, strict=False):
        for line in failures(case, seed):
            bad += 1
            print(f"{case}: {line}")
    for line in rejections():
        bad += 1
        print(line)
    print(f"club: {len(CASES)} interpreter cases, {bad} failures")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
