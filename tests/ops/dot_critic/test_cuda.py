"""The dot critic's CUDA kernels, run on the CPU by the emulator, against a materialised fp64 formula with autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.dot_critic import dispatch
from mi_kernels.ops.dot_critic.schema import COL_LSE, ROW_LSE, SIGNED, SOFTPLUS
from tests.cuda_emulator import build
from tests.cuda_emulator.operators import Emulated, poisoned, surrounded

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="the CUDA emulator needs g++")
EVERYTHING = ROW_LSE | COL_LSE | SOFTPLUS
ALL_GRADIENTS = 31
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    G: int = 1
    B: int = 37
    N: int = 45
    D: int = 19
    dtype: torch.dtype = FP32
    tf32: bool = False
    pairs: int = 0
    shift: int = 0
    stats: int = EVERYTHING
    biases: bool = False
    hole: bool = False
    same_ids: bool = False
    spread: float = 1.0
    weight: float = 1.0
    clip: float = math.inf


CASES = (
    [Case(pairs=p, biases=p % 2 == 0, stats=EVERYTHING | SIGNED, shift=3, dtype=BF16, D=24) for p in range(4)]
    + [Case(pairs=p, B=41, N=17, G=2, D=5, shift=5, stats=EVERYTHING | SIGNED) for p in range(4)]
    + [Case(stats=s, shift=-1, dtype=BF16, D=16) for s in (ROW_LSE, COL_LSE, SOFTPLUS, ROW_LSE | SOFTPLUS)]
    + [Case(dtype=t, D=67, B=135, N=131, biases=True) for t in (BF16, FP16, FP32)]
    + [Case(dtype=t, D=72, B=70, N=140, G=2, pairs=3, shift=2) for t in (BF16, FP16, FP32)]
    + [Case(tf32=True, D=33, biases=True), Case(tf32=True, D=40)]
    + [Case(dtype=t, D=d, B=33, N=35) for t, d in ((BF16, 130), (FP16, 512), (FP32, 132), (FP32, 256))]
    + [Case(dtype=t, D=d, B=20, N=35, G=2, biases=True, stats=EVERYTHING | SIGNED)
       for t, d in ((BF16, 520), (FP16, 523), (FP32, 260), (FP32, 301))]
    + [Case(B=1, N=1, D=1), Case(B=1, N=50, D=3, pairs=1), Case(B=50, N=1, D=8, dtype=FP16, shift=-1)]
    + [Case(same_ids=True, pairs=p, stats=EVERYTHING | SIGNED) for p in (2, 3)]
    + [Case(spread=30.0), Case(biases=True, hole=True), Case(dtype=FP16, weight=1e-7, D=32)]
    + [Case(pairs=p, clip=0.7, spread=8.0, biases=p % 2 == 1, stats=EVERYTHING | SIGNED) for p in range(4)]
)  # fmt: skip


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    yield from poisoned("dot_critic")


def inputs(case: Case) -> dict[str, Tensor | None]:
    gen = torch.Generator().manual_seed(sum(map(ord, repr(case))))
    G, B, N, D = case.G, case.B, case.N, case.D

    def normal(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
        return surrounded((torch.randn(*shape, generator=gen, dtype=torch.float64) * scale).to(dtype))

    def ids(n: int) -> Tensor:
        return surrounded(torch.randint(0, 1 if case.same_ids else 5, (G, n), generator=gen) + 2**40)

    root = (case.spread / D**0.5) ** 0.5
    v: dict[str, Tensor | None] = {
        "x": normal(G, B, D, dtype=case.dtype, scale=root),
        "y": normal(G, N, D, dtype=case.dtype, scale=root),
        "scale": normal(G).abs() + 0.5,
        "row_bias": normal(G, B) if case.biases else None,
        "col_bias": normal(G, N) if case.biases else None,
        "row_ids": ids(B) if case.pairs >= 2 else None,
        "col_ids": ids(N) if case.pairs >= 2 else None,
    }
    if case.hole:
        v["row_bias"][:, 2] = -math.inf
    for name, n, on in (("g_row", B, ROW_LSE), ("g_col", N, COL_LSE), ("g_soft", B, SOFTPLUS)):
        v[name] = normal(G, n, scale=case.weight) if case.stats & on else None
    v["g_pos"] = normal(G, B, scale=case.weight) if case.shift >= 0 and case.pairs in (0, 3) else None
    return v


def oracle(case: Case, v: dict[str, Tensor | None], dtype: torch.dtype) -> tuple[dict, dict, Tensor]:
    """Statistics and gradients in `dtype` from materialised scores, and the absolute sum of the terms of dscale."""
    names = [k for k in ("x", "y", "scale", "row_bias", "col_bias") if v[k] is not None]
    leaf = {k: v[k].to(dtype).nan_to_num(neginf=0.0).requires_grad_() for k in names}
    dots = leaf["x"] @ leaf["y"].mT
    s = dots * leaf["scale"][:, None, None]
    if case.biases:
        s = s + leaf["row_bias"][:, :, None] + leaf["col_bias"][:, None, :]
    i, j = torch.arange(case.B)[:, None], torch.arange(case.N)[None]
    positive = ((i + case.shift) % case.N == j) & (case.shift >= 0)
    taken = torch.ones_like(s, dtype=torch.bool)
    if case.pairs == 1:
        taken = taken & (i != j)
    if case.pairs >= 2:
        taken = v["row_ids"][:, :, None] != v["col_ids"][:, None, :]
    if case.pairs == 3:
        taken = taken | positive
    if case.hole:
        taken = taken & (torch.arange(case.B) != 2)[:, None]

    def lse(dim: int) -> Tensor:
        clipped = torch.where(taken, s.clamp(-case.clip, case.clip), -math.inf)
        some = taken.any(dim)
        return torch.where(some, torch.where(some.unsqueeze(dim), clipped, 0.0).logsumexp(dim), -math.inf)

    signed = torch.where(positive, -s, s) if case.stats & SIGNED else s
    soft = torch.where(taken, F.softplus(signed, threshold=1e4), 0.0).sum(2)
    out = {"row": lse(2), "col": lse(1), "soft": soft}
    weighted = zip(out.values(), (v["g_row"], v["g_col"], v["g_soft"]), strict=True)
    loss = sum((t.nan_to_num(neginf=0.0) * g.to(dtype)).sum() for t, g in weighted if g is not None)
    if v["g_pos"] is not None:
        loss = loss + (torch.where(positive, s, 0.0).sum(2) * v["g_pos"].to(dtype)).sum()
    *grads, ds = torch.autograd.grad(loss, [*leaf.values(), s])
    return out, dict(zip(names, grads, strict=True)), (ds * dots).abs().sum((1, 2))


def measured(case: Case, v: dict[str, Tensor | None]) -> tuple[dict, dict]:
    cuda = torch.ops.mi_kernels_cuda
    problem = [v[k] for k in ("x", "y", "scale", "row_bias", "col_bias", "row_ids", "col_ids")]
    problem += [case.pairs, case.shift]
    row, col, soft = cuda.dot_critic_stats(*problem, case.stats, case.clip, case.tf32)
    lses = (row if row.numel() else None, col if col.numel() else None)
    weights = (v["g_row"], v["g_col"], v["g_soft"], v["g_pos"], bool(case.stats & SIGNED))
    grads = cuda.dot_critic_grad(*problem, *lses, *weights, ALL_GRADIENTS, case.tf32)
    names = ("x", "y", "scale", "row_bias", "col_bias")
    return {"row": row, "col": col, "soft": soft}, dict(zip(names, grads, strict=True))


def error(a: Tensor, b: Tensor, size: Tensor | None = None) -> float:
    a, b = a.double(), b.double()
    if a.shape != b.shape or not torch.equal(a.isinf(), b.isinf()) or a.isnan().any():
        return math.inf
    keep = b.isfinite()
    norm = (b[keep] if size is None else size).norm().item()
    return (a[keep] - b[keep]).norm().item() / (norm or 1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_and_gradients_match_the_fp64_formula(emulated: Emulated, case: Case) -> None:
    v = inputs(case)
    emulated.schedule(0, 0)
    out, grads = measured(case, v)
    exact_out, exact_grads, terms = oracle(case, v, torch.float64)
    plain_out, plain_grads, _ = oracle(case, v, case.dtype)
    slack = 1e-3 if case.tf32 else 1e-6
    for (name, got), bit in zip(out.items(), (ROW_LSE, COL_LSE, SOFTPLUS), strict=True):
        if not case.stats & bit:
            assert got.shape == (0,)
            continue
        want = exact_out[name]
        assert error(got, want) <= 2 * min(error(plain_out[name], want), 1.0) + slack, name
    if case.clip < math.inf:
        return  # clipped statistics have no gradient
    for name, want in exact_grads.items():
        size = terms if name == "scale" else None
        assert error(grads[name], want, size) <= 2 * min(error(plain_grads[name], want, size), 1.0) + slack, name
    assert grads["x"].dtype == grads["y"].dtype == torch.float32  # not yet converted to the dtype of x


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_no_order_of_threads_and_copies_changes_a_bit(emulated: Emulated, case: Case) -> None:
    v = inputs(case)
    runs = []
    for schedule in ((0, 0), (1, 0), (0, 1), (1, 1)):
        emulated.schedule(*schedule)
        out, grads = measured(case, v)
        runs.append([t.nan_to_num(7.0) for t in (*out.values(), *grads.values())])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_rows_in_many_blocks_and_columns_in_many_splits(emulated: Emulated) -> None:
    case = Case(G=2, B=300, N=260, D=8, dtype=BF16, biases=True)
    v = inputs(case)
    out, _ = measured(case, v)
    exact, _, _ = oracle(case, v, torch.float64)
    for name, want in exact.items():
        assert error(out[name], want) <= 1e-6, name


def test_unwanted_gradients_are_not_computed(emulated: Emulated) -> None:
    v = inputs(case := Case(dtype=BF16, D=16, B=20, N=24, biases=True))
    _, full = measured(case, v)
    problem = [v[k] for k in ("x", "y", "scale", "row_bias", "col_bias", "row_ids", "col_ids")] + [0, 0]
    row, col, _ = torch.ops.mi_kernels_cuda.dot_critic_stats(*problem, EVERYTHING, math.inf, False)
    weights = (row, col, v["g_row"], v["g_col"], v["g_soft"], v["g_pos"], False)
    for needs, names in ((1, "x"), (2, "y"), (16, ["scale"]), (4, ["row_bias"]), (8, ["col_bias"])):
        grads = torch.ops.mi_kernels_cuda.dot_critic_grad(*problem, *weights, needs, False)
        for (name, want), got in zip(full.items(), grads, strict=True):
            assert torch.equal(got, want) if name in names else got.numel() == 0


def test_losses_run_on_the_kernels(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(30, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)
    want = mk.info_nce(x, y, temperature=0.2, symmetric=True, backend="reference")
    want_grads = torch.autograd.grad(want, (x, y))
    monkeypatch.setattr(dispatch, "resolve", lambda op, device, name=None: "cuda")
    got = mk.info_nce(x, y, temperature=0.2, symmetric=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (x, y)), want_grads)
    with pytest.raises(RuntimeError, match="no kernel for torch"):
        mk.info_nce(x.double(), y.double())


def test_naming_the_backend_without_a_gpu_says_why() -> None:
    reason = mk.backends()["cuda"]
    if reason == "available":
        pytest.skip("a CUDA device is here")
    with pytest.raises(RuntimeError, match="backend 'cuda' was requested but cannot run dot_critic"):
        mk.info_nce(torch.randn(4, 3), torch.randn(4, 3), backend="cuda")
