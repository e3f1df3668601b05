"""Attention's Triton kernels in the interpreter, against autograd through the definition in fp64.

tests/triton_checks.py runs this in its own process, because triton reads TRITON_INTERPRET when it is imported.
"""

import warnings
from itertools import count

import torch

import mi_kernels as mk
from mi_kernels.ops.cross_attention import triton_backward, triton_forward
from tests.ops.cross_attention.cases import Case, Pair, failures, hidden_nans
from tests.ops.distance import distance

BOTH = (False, True)
THREE = (
    Pair(B=2, Tq=17, Tk=33, offset=16, lengths="k"),
    Pair(B=2, Tq=33, Tk=17, lengths="qk", dropout=0.4, scale=1.3),
    Pair(B=3, heads=1, Tq=5, Tk=50, offset=-2, lengths="q"),
)
CASES = (
    [Case(sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(B=3, lengths="qk", offset=c),), sparse=s) for s in BOTH for c in (-7, 0)]
    + [Case(pairs=(Pair(dropout=0.5, offset=3, merged=True),), sparse=s) for s in BOTH]
    + [Case(pairs=THREE, sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(Tq=1, Tk=1, E=1, EV=1), Pair(E=16, EV=16), Pair(Tq=1, E=1, EV=1)), sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(Tq=35, Tk=18, E=35, EV=20, dropout=0.1),), sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(Tq=9, Tk=30, E=3, EV=37),), sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(heads=1, Tq=20),), sparse=s, dtype=t)
       for s in BOTH for t in (torch.float64, torch.bfloat16, torch.float16)]
    + [Case(pairs=(Pair(heads=1, Tk=70),), sparse=s, spread=d) for s in BOTH for d in (0.01, 30.0)]
    # Scores so large that tau is lost in their rounding.
    + [Case(pairs=(Pair(heads=1, Tk=70),), sparse=True, spread=d, dtype=t)
       for d, t in ((1e9, torch.float32), (1e30, torch.float32), (1e60, torch.float64))]
)  # fmt: skip


def poisoned(empty):
    def fill(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    return fill


def public_failures() -> list[str]:
    """Complaints if the public function with dropout has other values, first or second derivatives than the
    definition."""
    gen = torch.Generator().manual_seed(0)
    sides = [[torch.randn(1, 2, T, 3, generator=gen, dtype=torch.float64) for T in (9, 11)] for _ in range(3)]
    leaves = [t.requires_grad_() for side in sides for t in side]
    found = []
    for backend in ("triton", "reference"):
        out = mk.cross_attention_grouped(*sides, causal_offset=[2, None], dropout_p=0.5, seed=7, backend=backend)
        grads = torch.autograd.grad(sum(o.square().sum() for o in out), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append([t.detach() for t in (*out, *grads, *twice)])
    errors = [distance(a, b) for a, b in zip(*found, strict=True)]
    return [] if max(errors) < 1e-12 else [f"triton and the definition differ by {max(errors):.1e}"]


def main() -> int:
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    bad = 0
    for seed, case in zip(count(), CASES, strict=False):
        for line in failures(case, seed, triton_forward.forward, triton_backward.backward):
            bad += 1
            print(f"{case}: {line}")
    for sparse in BOTH:
        for line in hidden_nans(sparse, triton_forward.forward):
            bad += 1
            print(f"sparse={sparse}: {line}")
    for line in public_failures():
        bad += 1
        print(f"mk.cross_attention_grouped: {line}")
    print(f"cross_attention: {len(CASES)} interpreter cases, {bad} failures")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
