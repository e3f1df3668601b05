"""The MLP critic's Triton kernels in the interpreter, against autograd through the definition in fp64.

tests/triton_checks.py runs this in its own process, because triton reads TRITON_INTERPRET when it is imported.
"""

import os
import warnings
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from torch import Tensor

from mi_kernels.ops.common.arguments import split
from mi_kernels.ops.common.statistics import STATISTICS
from mi_kernels.ops.mlp_critic import api, chunked, reference, triton_common
from mi_kernels.ops.mlp_critic.activations import ACTIVATIONS
from mi_kernels.ops.mlp_critic.problem import Critic, LogSums, Score, Slopes
from mi_kernels.ops.mlp_critic.schema import COL_LSE, ROW_LSE
from tests.ops.distance import distance
from tests.triton_cases import DEVICE

KEEP, RECOMPUTE = 2**26, 1


@dataclass(frozen=True)
class Case:
    B: int = 9
    N: int = 9
    hidden: tuple[int, ...] = (35, 37)
    activation: str = "relu"
    output: str = "identity"
    pairs: str = "all"
    dtype: torch.dtype = torch.float32
    groups: int | None = None
    own: bool = True
    budget: int = KEEP
    stats: tuple[str, ...] = STATISTICS
    clip: float = 0.2
    frozen: bool = False
    weight: float = 1.0
    twice: bool = False
    exact: bool = False  # inputs for which rounding to 16 bits cannot change the sign of a unit
    schedule: str = "fused"

    @property
    def square_or_not(self) -> tuple[str, ...]:
        return self.stats if self.B == self.N else tuple(s for s in self.stats if s != "positive")


OTHERS = tuple(a for a in ACTIVATIONS if a != "relu")
ONE = (35,)
CASES = (
    [Case(activation=a, dtype=torch.float64, hidden=(7, 9)) for a in OTHERS]
    + [Case(activation=a, dtype=torch.float64, hidden=(7,), output="softplus") for a in ACTIVATIONS]
    + [Case(pairs="off_diagonal", output="softplus"), Case(pairs="off_diagonal", output="softplus", hidden=ONE)]
    + [Case(activation="gelu", pairs="off_diagonal", output="softplus")]
    # Rectangles: rows and columns of several tiles, chunks of rows and of columns, one row, one column.
    + [Case(B=5, N=37, hidden=(5, 3)), Case(B=37, N=5, hidden=ONE), Case(B=1, N=18), Case(B=18, N=1)]
    + [Case(B=11, N=37, hidden=(5, 3), budget=RECOMPUTE), Case(B=11, N=37, hidden=ONE, budget=RECOMPUTE)]
    + [Case(B=11, N=37, hidden=(5, 3), activation="elu", budget=RECOMPUTE)]
    + [Case(B=19, N=19, hidden=h, pairs="off_diagonal", budget=RECOMPUTE) for h in ((4,), (5, 3))]
    + [Case(B=1, N=1, hidden=(1, 1)), Case(B=1, N=1, hidden=(1,), pairs="off_diagonal")]
    + [Case(B=3, N=3, groups=2, own=own, hidden=h) for own in (True, False) for h in (ONE, (3, 33))]
    + [Case(B=9, N=9, groups=2, own=own, hidden=(3, 5), activation="silu", budget=9000) for own in (True, False)]
    + [Case(dtype=t, exact=True, twice=True) for t in (torch.bfloat16, torch.float16)]
    + [Case(dtype=t, activation="tanh", budget=RECOMPUTE) for t in (torch.bfloat16, torch.float16)]
    + [Case(dtype=torch.float16, weight=1e-7, hidden=(8, 8)), Case(dtype=torch.bfloat16, hidden=ONE)]
    + [Case(B=21, N=21, hidden=(70, 33), activation="leaky_relu", budget=RECOMPUTE, twice=True)]
    + [Case(stats=(s,), hidden=(5, 3)) for s in ("row_lse", "col_lse", "row_sum", "row_softplus")]
    + [Case(frozen=True, hidden=h) for h in (ONE, (5, 3))]
    + [Case(frozen=True, hidden=(5, 3), activation="sigmoid", stats=("row_lse",))]
    # The schedule that stores layers in chunks and uses torch's matmuls.
    + [Case(B=11, N=19, activation=a, output=o, budget=b, schedule="stored") for a, o, b in (
        ("relu", "identity", RECOMPUTE), ("gelu", "softplus", RECOMPUTE), ("tanh", "identity", 9000),
    )]
    + [Case(activation="elu", pairs="off_diagonal", budget=1500, schedule="stored", twice=True, frozen=True)]
    + [Case(groups=2, own=own, activation="silu", hidden=(3, 5), budget=b, schedule="stored")
       for own, b in ((True, 9000), (False, 9000), (True, 3000))]
    + [Case(dtype=t, exact=True, budget=RECOMPUTE, schedule="stored") for t in (torch.bfloat16, torch.float16)]
    + [Case(dtype=torch.float16, weight=1e-7, activation="tanh", hidden=(8, 8), budget=1000, schedule="stored")]
)  # fmt: skip


def inputs(case: Case, seed: int) -> tuple[list[Tensor], int]:
    """The inputs [x, y, weights..., biases...], and the number of layers."""
    gen = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    lead = () if case.groups is None else (case.groups,)
    own = lead if case.own else ()
    widths = [5, *case.hidden, 1]
    layers = len(widths) - 1
    weights = [normal(*own, o, i) / i**0.5 for i, o in pairwise(widths)]
    biases = [normal(*own, o) / 3 for o in widths[1:]]
    tensors = [normal(*lead, case.B, 3), normal(*lead, case.N, 2), *weights, *biases]
    if case.exact:
        # Products are multiples of 1/2 and 1/8, biases odd multiples of 1/4 and 1/16: exact in 16 bits, no sum is 0.
        tensors = [t.sign() * (t.abs() > 0.5) for t in tensors]
        tensors = [*tensors[:2], *(t / 2 for t in tensors[2 : 2 + layers]), *tensors[2 + layers :]]
        tensors[2 + layers] = tensors[2 + layers].mul(2).add(1).div(4)
        tensors[3 + layers] = tensors[3 + layers].mul(2).add(1).div(16)
    return [t.to(case.dtype) for t in tensors], layers


def combination(case: Case, out: dict[str, Tensor]) -> Tensor:
    gen = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64, device=next(iter(out.values())).device)
    for name in case.square_or_not:
        w = torch.randn(out[name].shape, generator=gen, dtype=torch.float64).to(total.device) * case.weight
        if out[name].requires_grad:
            total = total + (torch.where(out[name].isfinite(), out[name], 0.0).double() * w).sum()
    return total


def measured(case: Case, tensors: list[Tensor], layers: int, backend: str) -> dict[str, Tensor]:
    """Statistics by name, and gradients by argument of a random combination of the finite statistics."""
    device = DEVICE if backend == "triton" else tensors[0].device
    leaves = [t.detach().to(device, copy=True).requires_grad_(k < 2 or not case.frozen) for k, t in enumerate(tensors)]
    x, y, *rest = leaves
    found = api.statistics(
        x, y, rest[:layers], rest[layers:], activation=case.activation, output=case.output, stats=case.square_or_not,
        pairs=case.pairs, clip=case.clip, memory_budget=case.budget, backend=backend,
    )  # fmt: skip
    out = {name: t for name, t in found._asdict().items() if t is not None}
    names = ("x", "y", *(f"weights[{k}]" for k in range(layers)), *(f"biases[{k}]" for k in range(layers)))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(combination(case, out), wanted)
    out |= {f"d{name}": g for name, g in zip(names, grads, strict=False)}
    return {name: t.cpu() for name, t in out.items()}


def terms(case: Case, tensors: list[Tensor], layers: int) -> Tensor:
    """The absolute sum of the terms of the last bias's gradient, which may cancel."""
    x, y, *rest = tensors
    first = api.scores(x, y, rest[:layers], rest[layers:], activation=case.activation, output="identity").detach()
    first = first.reshape(-1, case.B, case.N).requires_grad_()
    s = reference.softplus(first) if case.output == "softplus" else first
    found = reference.reduce_scores(s, case.pairs == "off_diagonal", case.clip)
    out = {k: t.reshape(*x.shape[:-2], -1) for k, t in zip(STATISTICS, found, strict=True)}
    (ds,) = torch.autograd.grad(combination(case, out), first)
    return ds.abs().sum((1, 2))


def poisoned(empty):
    def fill(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-1)

    return fill


def failures(case: Case, seed: int) -> list[str]:
    os.environ["MI_KERNELS_SCHEDULE"] = case.schedule
    tensors, layers = inputs(case, seed)
    got = measured(case, tensors, layers, "triton")
    exact = measured(case, [t.double() for t in tensors], layers, "reference")
    plain = measured(case, tensors, layers, "reference")
    found = []
    last_bias = f"dbiases[{layers - 1}]"
    slack = 1e-13 if case.dtype == torch.float64 else 1e-6
    for name, value in exact.items():
        size = terms(case, [t.double() for t in tensors], layers) if name == last_bias else None
        err, of_plain = distance(got[name], value, size), distance(plain[name], value, size)
        if not err <= 2 * of_plain + slack:
            found.append(f"{name}: error {err:.2e}, plain torch {of_plain:.2e}")
        if got[name].dtype != plain[name].dtype:
            found.append(f"{name}: dtype {got[name].dtype}")
    if case.twice:
        again = measured(case, tensors, layers, "triton")
        found += [f"{name}: two runs differ" for name in got if not torch.equal(got[name], again[name])]
    return found


def operator_failures() -> list[str]:
    """Complaints about the operators' fakes and schemas, with parameters of which only some are shared by groups."""
    gen = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    u, v = normal(2, 3, 4), normal(2, 3, 4)
    weights, biases = [normal(1, 3, 4), normal(2, 1, 3)], [normal(1, 3), normal(2, 1)]
    critic = (u, v, weights, biases, "relu", "identity", False)
    ops, tests = torch.ops.mi_kernels, ("test_schema", "test_faketensor")
    found, gradients = [], []
    for keep in (True, False):
        arguments = (*critic, ROW_LSE | COL_LSE, torch.tensor(1.0), keep, 100, "triton")
        results = [torch.library.opcheck(ops.mlp_critic_forward.default, arguments, test_utils=tests)]
        positive, row_lse, col_lse, row_sum, _, _, *kept = ops.mlp_critic_forward(*arguments)
        given = (*critic, row_lse, col_lse, positive, row_lse, None, row_sum, row_sum, *kept, True, 100, "triton")
        results.append(torch.library.opcheck(ops.mlp_critic_backward.default, given, test_utils=tests))
        found += [f"{name}: {r}" for done in results for name, r in done.items() if r != "SUCCESS"]
        gradients.append(ops.mlp_critic_backward(*given))
    slopes = Slopes(positive, row_lse, None, row_sum, row_sum)
    expected = chunked.backward(*split(critic, Critic, Score), LogSums(row_lse, col_lse), slopes, True, 100)
    found += [
        f"gradient {k} of mixed parameters: error {distance(a, b):.2e}"
        for got in gradients
        for k, (a, b) in enumerate(zip(got, expected, strict=True))
        if not distance(a, b) < 2e-6
    ]
    return found


def chunk_failures() -> list[str]:
    """Complaints if chunks do not cover each pair exactly once or exceed the budget."""
    found = []
    for sizes in ((3, 5, 7), (1, 100, 3), (2, 1, 300), (2, 33, 130)):
        for pairs in (1, 40, 200, 10**6):
            covered = torch.zeros(sizes, dtype=torch.int64)
            for at in triton_common.chunks(sizes, 4, 4 * pairs, 4, 16):
                covered[at] += 1
                if covered[at].numel() > max(pairs, 64):
                    found.append(f"chunk {at} of {sizes} has more than {pairs} pairs")
            if not covered.eq(1).all():
                found.append(f"chunks of {pairs} pairs do not cover {sizes} once")
    return found


def main() -> int:
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
    triton_common._PROGRAMS = 6  # so that even small cases have sums of several parts with several terms each
    torch.empty = poisoned(torch.empty)
    others = chunk_failures() + (operator_failures() if DEVICE.type == "cpu" else [])
    print(*others, sep="\n", end="\n" if others else "")
    bad = len(others)
    for seed, case in zip(count(), CASES, strict=False):
        for line in failures(case, seed):
            bad += 1
            print(f"{case}: {line}")
    print(f"mlp_critic: {len(CASES)} interpreter cases, {bad} failures")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
