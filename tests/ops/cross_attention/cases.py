"""Test cases for attention's GPU kernels: groups of directed pairs, their inputs, and the definition with autograd."""

from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch

from mi_kernels.ops.cross_attention import problem, reference
from mi_kernels.ops.cross_attention.schema import NO_OFFSET
from tests.ops.distance import distance


@dataclass(frozen=True)
class Pair:
    B: int = 1
    heads: int = 2
    Tq: int = 37
    Tk: int = 19
    E: int = 4
    EV: int = 5
    offset: int = NO_OFFSET
    lengths: str = ""  # contains "q", "k" or both: the sides that have lengths
    dropout: float = 0.0
    scale: float = 0.7
    merged: bool = False  # heads are columns of one [B, T, heads E] array, like a projection's output


@dataclass(frozen=True)
class Case:
    pairs: tuple[Pair, ...] = field(default=(Pair(),))
    sparse: bool = False
    dtype: torch.dtype = torch.float32
    spread: float = 1.0


def inputs(case: Case, seed: int) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """query, key, value, grad_out, query_lengths and key_lengths of all pairs, and the seeds. Padding is NaN."""
    gen = torch.Generator().manual_seed(seed)

    def sequence(p: Pair, T: int, D: int, size: float = 1.0) -> torch.Tensor:
        shape = (p.B, T, p.heads, D) if p.merged else (p.B, p.heads, T, D)
        t = (torch.randn(shape, generator=gen, dtype=torch.float64) * size).to(case.dtype)
        return t.transpose(1, 2) if p.merged else t

    def lengths(on: bool, p: Pair, T: int) -> torch.Tensor:
        if not on:
            return torch.empty(0, dtype=torch.int64)
        n = torch.randint(0, T + 1, (p.B,), generator=gen)
        n[0] = T
        if p.B > 2:
            n[2] = 0
        return n

    sides: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for p in case.pairs:
        n_q, n_k = lengths("q" in p.lengths, p, p.Tq), lengths("k" in p.lengths, p, p.Tk)
        tensors = [sequence(p, T, D, size) for T, D, size in
                   ((p.Tq, p.E, case.spread), (p.Tk, p.E, 1.0), (p.Tk, p.EV, 1.0), (p.Tq, p.EV, 1.0))]  # fmt: skip
        for t, n in zip(tensors, (n_q, n_k, n_k, n_q), strict=True):
            for item, end in enumerate(n.tolist()):
                t[item, :, end:] = float("nan")
        for side, t in zip(sides, (*tensors, n_q, n_k), strict=True):
            side.append(t)
    return sides, [torch.randint(-(2**62), 2**62, (1,), generator=gen) for _ in case.pairs]


def rules(case: Case) -> tuple[list, list, list]:
    return [p.offset for p in case.pairs], [p.scale for p in case.pairs], [p.dropout for p in case.pairs]


def oracle(case: Case, sides: list, seeds: list, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """The definition with all arithmetic in `dtype`; by itself it would compute 16-bit inputs in fp32."""
    found = []
    with mock.patch.object(reference, "accumulate_dtype", lambda _: dtype):
        for q, k, v, g, n_q, n_k, offset, scale, p, seed in zip(*sides, *rules(case), seeds, strict=True):
            q, k, v = leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
            out, stat = reference.attention(problem.Pair(q, k, v, n_q, n_k, offset, scale, p, seed, case.sparse))
            end = n_q.view(-1, 1, 1, 1) if n_q.numel() else q.shape[2]
            g = torch.where(torch.arange(q.shape[2])[:, None] < end, g, 0.0).to(dtype)
            dq, dk, dv = torch.autograd.grad(out, leaves, g)
            found.append({"out": out.detach(), "stat": stat.detach(), "dq": dq, "dk": dk, "dv": dv})
    return found


def measured(
    case: Case, sides: list, seeds: list, forward: Callable, backward: Callable
) -> list[dict[str, torch.Tensor]]:
    """Outputs, statistics and gradients of kernels that take the operators' arguments, for each pair."""
    q, k, v, g, n_q, n_k = sides
    n, rule = len(case.pairs), (n_q, n_k, *rules(case), torch.cat(seeds), case.sparse)
    found = forward(q, k, v, *rule)
    grads = backward(g, q, k, v, found[:n], found[n:], *rule)
    names = ("out", "stat", "dq", "dk", "dv")
    return [dict(zip(names, (*found[i::n], *grads[i::n]), strict=True)) for i in range(n)]


def failures(case: Case, seed: int, forward: Callable, backward: Callable) -> list[str]:
    """Complaints: errors of more than twice plain torch's plus 1e-6, wrong dtypes, and differences between two runs."""
    sides, seeds = inputs(case, seed)
    exact, plain = (oracle(case, sides, seeds, dtype) for dtype in (torch.float64, case.dtype))
    first = measured(case, sides, seeds, forward, backward)
    again = measured(case, sides, seeds, forward, backward) if seed % 5 == 0 else first
    found = []
    for i, (e, p, a, b) in enumerate(zip(exact, plain, first, again, strict=True)):
        for name in e:
            if not torch.equal(a[name], b[name]):
                found.append(f"pair {i}, {name}: two runs differ")
            err, usual = distance(a[name], e[name]), distance(p[name], e[name])
            if not err <= 2 * min(usual, 1.0) + 1e-6:
                found.append(f"pair {i}, {name}: error {err:.2e}, plain torch {usual:.2e}")
            if name != "stat" and a[name].dtype != case.dtype:
                found.append(f"pair {i}, {name}: dtype {a[name].dtype}")
    return found


def hidden_nans(sparse: bool, forward: Callable) -> list[str]:
    """Complaints if a NaN in a key does not reach exactly the rows that attend to it, or a NaN in a query its own row
    (where it makes every score NaN)."""
    case = Case(pairs=(Pair(B=2, Tk=40, offset=3, lengths="k"),), sparse=sparse)
    sides, seeds = inputs(case, 0)
    q, k, v, _, n_q, n_k = sides
    run = lambda: forward(q, k, v, n_q, n_k, *rules(case), torch.cat(seeds), sparse)[0]  # noqa: E731
    clean = run().clone()
    q[0][0, 1, 5, 2] = k[0][0, 0, 9, 1] = float("nan")
    out = run()
    shows = torch.zeros(out.shape[:3], dtype=torch.bool)
    shows[0, 1, 5] = shows[0, 0, 6:] = True
    found = [] if torch.equal(out[shows].isnan(), torch.ones_like(out[shows], dtype=torch.bool)) else ["hides a NaN"]
    return found if torch.equal(out[~shows], clean[~shows]) else [*found, "a NaN shows where it is not seen"]
