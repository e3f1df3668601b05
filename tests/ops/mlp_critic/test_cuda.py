"""The MLP critic's CUDA kernels, run on the CPU by the emulator, against materialised fp64 scores with autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.mlp_critic import cuda, dispatch
from tests.cuda_emulator import build
from tests.cuda_emulator.operators import Emulated, poisoned, surrounded
from tests.ops.mlp_critic.test_short_types import SHAPES, errors, ours, public

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="the CUDA emulator needs g++")
EVERYTHING = 15
NAMES = ("positive", "row_lse", "col_lse", "row_sum", "row_softplus", "clipped")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    G: int = 1
    B: int = 18
    N: int = 18
    H1: int = 24
    H2: int = 40
    dtype: torch.dtype = FP32
    tf32: bool = False
    own: bool = False
    activation: str = "relu"
    output: str = "identity"
    off: bool = False
    stats: int = EVERYTHING
    weight: float = 1.0
    keep: bool = True
    budget: int = 1 << 20


CASES = (
    [
        Case(dtype=t, H1=h1, H2=h2, G=2)
        for t, h1, h2 in ((BF16, 72, 136), (FP16, 70, 33), (FP32, 40, 131), (FP32, 35, 1))
    ]
    + [Case(dtype=BF16, off=True), Case(off=True, output="softplus"), Case(dtype=FP16, output="softplus", weight=1e-7)]
    + [Case(B=35, N=21), Case(B=7, N=40, dtype=BF16, H1=33), Case(tf32=True), Case(B=1, N=1, off=True)]
    + [Case(G=3, own=True, dtype=BF16, H1=16), Case(G=2, own=True, B=5, N=9), Case(stats=0, B=5, N=9)]
    + [Case(activation="leaky_relu", dtype=t) for t in (FP16, FP32)]
    + [Case(B=5, N=9, H1=290, H2=140), Case(B=5, N=9, H1=530, H2=40, dtype=BF16), Case(B=3, N=4, H1=150, dtype=FP16)]
    + [Case(keep=False, B=40, N=12, budget=5000), Case(keep=False, G=3, own=True, budget=20000, dtype=BF16)]
)


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    yield from poisoned("mlp_critic")


def inputs(case: Case) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    gen = torch.Generator().manual_seed(sum(map(ord, repr(case))))
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    groups = case.G if case.own else 1
    tensors = {
        "u": normal(case.G, case.B, case.H1),
        "v": normal(case.G, case.N, case.H1),
        "w2": normal(groups, case.H2, case.H1) / case.H1**0.5,
        "w": normal(1, 1, case.H2) / case.H2**0.5,
        "b2": normal(groups, case.H2) * 0.3,
        "b": normal(groups, 1),
    }
    flowing: list[Tensor | None] = [
        normal(case.G, case.B) if case.B == case.N else None,
        normal(case.G, case.B) if case.stats & 1 else None,
        normal(case.G, case.N) if case.stats & 2 else None,
        normal(case.G, case.B),
        normal(case.G, case.B) if case.stats & 4 else None,
    ]
    flowing = [None if g is None else surrounded((g * case.weight).float()) for g in flowing]
    if case.tf32:  # sums and weights that are exact in TF32, so that rounding cannot change the sign of a unit
        tensors = {k: (t.clamp(-7, 7) * 32).round() / 32 for k, t in tensors.items()}
    types = {k: FP32 if k in ("u", "v") else case.dtype for k in tensors}  # as first_layer.apart returns them
    return {k: surrounded(t.to(types[k])) for k, t in tensors.items()}, flowing


def oracle(
    case: Case, tensors: dict[str, Tensor], flowing: list[Tensor | None], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics and gradients of u, v, w2, w, b2, b in `dtype`, from materialised activations."""
    wide = torch.promote_types(dtype, FP32)
    leaf = {k: t.to(wide if k in ("u", "v") else dtype).requires_grad_() for k, t in tensors.items()}
    act = {"relu": torch.relu, "leaky_relu": F.leaky_relu}[case.activation]
    h = act((leaf["u"][:, :, None] + leaf["v"][:, None]).to(dtype))
    z = act(torch.einsum("gijl,gkl->gijk", h, leaf["w2"].expand(case.G, -1, -1)) + leaf["b2"][:, None, None])
    s = (z * leaf["w"][:, :, None]).sum(-1) + leaf["b"][:, :, None]
    s = F.softplus(s, threshold=1e4) if case.output == "softplus" else s
    taken = ~torch.eye(case.B, case.N, dtype=torch.bool) if case.off else torch.ones(case.B, case.N, dtype=torch.bool)
    masked = torch.where(taken, s, -math.inf)
    lse = lambda t, dim: t.logsumexp(dim) if taken.any() else t.amax(dim).detach()  # noqa: E731
    positive = s.diagonal(dim1=1, dim2=2) if case.B == case.N else s[:, :0, 0]
    out = [
        positive,
        lse(masked, 2),
        lse(masked, 1),
        torch.where(taken, s, 0.0).sum(2),
        torch.where(taken, F.softplus(s, threshold=1e4), 0.0).sum(2),
        lse(torch.where(taken, s.clamp(-0.5, 0.5), -math.inf), 2).detach(),
    ]
    pairs = zip(out, flowing, strict=False)
    loss = sum((t.nan_to_num(neginf=0.0) * g.to(dtype)).sum() for t, g in pairs if g is not None)
    return out, list(torch.autograd.grad(loss, list(leaf.values())))


def measured(case: Case, t: dict[str, Tensor], flowing: list[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    critic = (t["u"], t["v"], [t["w2"], t["w"]], [t["b2"], t["b"]], case.activation, case.output, case.off)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    try:
        *out, scores, bits = cuda.forward(*critic, case.stats, 0.5, case.keep)
        found = cuda.backward(*critic, out[1], out[2], flowing, scores, bits, True, case.budget)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return tuple(out), found


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    if a.shape != b.shape or not torch.equal(a.isinf(), b.isinf()) or a.isnan().any():
        return math.inf
    keep = b.isfinite()
    return (a[keep] - b[keep]).norm().item() / (b[keep].norm().item() or 1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_and_gradients_match_the_fp64_formula(emulated: Emulated, case: Case) -> None:
    emulated.schedule(0, 0)
    tensors, flowing = inputs(case)
    out, grads = measured(case, tensors, flowing)
    exact_out, exact_grads = oracle(case, tensors, flowing, torch.float64)
    plain_out, plain_grads = oracle(case, tensors, flowing, case.dtype)
    slack = 1e-3 if case.tf32 else 2e-6
    wanted = (True, case.stats & 1, case.stats & 2, True, case.stats & 4, case.stats & 8)
    for name, got, want, plain, on in zip(NAMES, out, exact_out, plain_out, wanted, strict=True):
        if on:
            assert error(got, want) <= 2 * min(error(plain, want), 1.0) + slack, name
        else:
            assert got.shape == (case.G, 0)
    for name, got, want, plain in zip(tensors, grads, exact_grads, plain_grads, strict=True):
        assert got.dtype == tensors[name].dtype
        assert error(got, want) <= 2 * min(error(plain, want), 1.0) + slack, name


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=BF16, B=17, N=9, H1=72, H2=136),
        Case(dtype=FP32, B=17, N=9, H1=40, H2=40),
        Case(dtype=BF16, B=7, N=5, H1=530, H2=140),
        Case(keep=False, B=33, N=7, budget=5000),
    ],
    ids=str,
)
def test_no_order_of_threads_and_copies_changes_a_bit(emulated: Emulated, case: Case) -> None:
    tensors, flowing = inputs(case)
    runs = []
    for schedule in ((0, 0), (1, 0), (0, 1), (1, 1)):
        emulated.schedule(*schedule)
        out, grads = measured(case, tensors, flowing)
        runs.append([t.nan_to_num(7.0) for t in (*out, *grads)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_bounds_run_on_the_kernels(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = mk.ConcatCritic(5, 4, hidden_dims=(20, 12))
    bound = mk.InfoNCE(critic)
    x, y = torch.randn(11, 5), torch.randn(11, 4)
    parameters = list(critic.parameters())
    with mk.use_backend("reference"):
        want = bound(x, y)
        want_grads = torch.autograd.grad(want, parameters)
    monkeypatch.setattr(dispatch, "resolve", lambda op, device, name=None: "cuda")
    got = bound(x, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), want_grads)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_gradients_err_no_more_than_those_of_the_public_formulation(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(dispatch, "resolve", lambda op, device, name=None: "cuda")
    two_layers = [shape for shape in SHAPES if shape[3] == 2]
    mine, theirs = errors([ours("cuda", 2**26), public], dtype, autocast=False, shapes=two_layers)
    assert mine <= theirs, (mine, theirs)


def test_what_the_kernels_do_not_score_is_an_error() -> None:
    t, _ = inputs(case := Case())
    head = (t["u"], t["v"])
    with pytest.raises(RuntimeError, match="relu or leaky_relu, got tanh"):
        cuda.forward(*head, [t["w2"], t["w"]], [t["b2"], t["b"]], "tanh", "identity", False, 1, 0.5, False)
    with pytest.raises(RuntimeError, match=r"got 1 hidden layer\(s\)"):
        cuda.forward(*head, [torch.ones(1, 1, case.H1)], [t["b"]], "relu", "identity", False, 1, 0.5, False)
