"""The dot critic's Triton kernels in the interpreter, against autograd through materialised scores in fp64.

tests/triton_checks.py runs this in its own process, because triton reads TRITON_INTERPRET when it is imported.
"""

import math
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F

from mi_kernels.ops.dot_critic import triton_backward, triton_common, triton_forward
from mi_kernels.ops.dot_critic.schema import COL_LSE, ROW_LSE, SIGNED, SOFTPLUS
from tests.ops.distance import distance
from tests.triton_cases import DEVICE, prepare

EVERYTHING = ROW_LSE | COL_LSE | SOFTPLUS


@dataclass(frozen=True)
class Case:
    G: int = 1
    B: int = 37
    N: int = 37
    D: int = 19
    dtype: torch.dtype = torch.float32
    pairs: int = 0
    shift: int = 0
    stats: int = EVERYTHING
    biases: bool = False
    positive_gradient: bool = True
    same_ids: bool = False
    spread: float = 1.0
    bias_hole: bool = False
    weight: float = 1.0
    clip: float = math.inf


CASES = (
    [Case(pairs=p, stats=s, biases=p % 2 == 1) for p in range(4) for s in (EVERYTHING, EVERYTHING | SIGNED)]
    + [Case(pairs=p, shift=3, B=17, N=41, biases=True, stats=EVERYTHING | SIGNED) for p in range(4)]
    + [Case(pairs=p, shift=5, B=41, N=17, G=2, D=5, stats=EVERYTHING | SIGNED) for p in (0, 3)]
    + [Case(stats=s, positive_gradient=False, shift=-1) for s in (ROW_LSE, COL_LSE, SOFTPLUS)]
    + [Case(stats=0), Case(stats=ROW_LSE, pairs=1), Case(stats=COL_LSE, biases=True)]
    + [Case(B=1, N=1, D=1, pairs=p) for p in range(3)]
    + [Case(B=1, N=50, D=3, biases=True), Case(B=50, N=1, D=3), Case(D=71, G=3, B=5, N=7, biases=True)]
    + [Case(same_ids=True, pairs=p, stats=EVERYTHING | SIGNED) for p in (2, 3)]
    + [Case(spread=30.0), Case(biases=True, bias_hole=True), Case(B=0, N=3), Case(B=3, N=0), Case(G=0)]
    + [Case(dtype=t, D=70, pairs=3, biases=True) for t in (torch.float64, torch.bfloat16, torch.float16)]
    + [Case(D=35, G=2, pairs=p, shift=2, B=70, N=45, biases=True, stats=EVERYTHING | SIGNED) for p in range(4)]
    + [Case(D=35, positive_gradient=False, stats=s) for s in (ROW_LSE, COL_LSE, SOFTPLUS)]
    + [Case(D=33, biases=True, bias_hole=True), Case(D=33, same_ids=True, pairs=2)]
    + [Case(dtype=t, D=20) for t in (torch.bfloat16, torch.float16)]
    + [
        Case(dtype=torch.float16, weight=1e-7),
        Case(dtype=torch.float64, stats=EVERYTHING | SIGNED, spread=8.0),
    ]
    + [Case(pairs=p, clip=0.7, spread=8.0, biases=p % 2 == 1, stats=EVERYTHING | SIGNED) for p in range(4)]
    + [Case(dtype=t, D=70, clip=0.1, spread=8.0) for t in (torch.float64, torch.bfloat16)]
)


def inputs(case: Case, seed: int) -> dict:
    gen = torch.Generator().manual_seed(seed)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    G, B, N = case.G, case.B, case.N

    def normal(*shape, dtype=acc, scale=1.0):
        return (torch.randn(*shape, generator=gen, dtype=torch.float64) * scale).to(dtype)

    def ids(n):
        high = 1 if case.same_ids else 5
        return torch.randint(0, high, (G, n), generator=gen) + 2**40

    root = (case.spread / case.D**0.5) ** 0.5
    row_bias, col_bias = (normal(G, B), normal(G, N)) if case.biases else (None, None)
    if case.bias_hole:
        row_bias[:, 2] = -float("inf")
    return {
        "x": normal(G, B, case.D, dtype=case.dtype, scale=root),
        "y": normal(G, N, case.D, dtype=case.dtype, scale=root),
        "scale": normal(G).abs() + 0.5,
        "row_bias": row_bias,
        "col_bias": col_bias,
        "row_ids": ids(B) if case.pairs >= 2 else None,
        "col_ids": ids(N) if case.pairs >= 2 else None,
    }


def weights(case: Case, seed: int, acc: torch.dtype) -> dict:
    gen = torch.Generator().manual_seed(seed + 1000)

    def normal(on, n):
        return (torch.randn(case.G, n, generator=gen) * case.weight).to(acc) if on else None

    return {
        "g_row": normal(case.stats & ROW_LSE, case.B),
        "g_col": normal(case.stats & COL_LSE, case.N),
        "g_soft": normal(case.stats & SOFTPLUS, case.B),
        "g_pos": normal(case.positive_gradient and case.shift >= 0, case.B),
    }


def oracle(case: Case, v: dict, w: dict, dtype: torch.dtype) -> tuple[dict, dict, torch.Tensor]:
    """Statistics and gradients in `dtype` from materialised scores, and the absolute sum of the terms of dscale, which
    may cancel."""
    leaf = {k: t.to(dtype).requires_grad_() for k, t in v.items() if t is not None and "ids" not in k}
    G, B, N = case.G, case.B, case.N
    holes = v["row_bias"].isneginf() if case.biases else torch.zeros(G, B, dtype=torch.bool)
    if case.biases:
        leaf["row_bias"] = torch.where(holes, 0.0, v["row_bias"]).to(dtype).requires_grad_()
    scores = leaf["scale"][:, None, None] * (dots := leaf["x"] @ leaf["y"].transpose(1, 2))
    if case.biases:
        scores = scores + leaf["row_bias"][:, :, None] + leaf["col_bias"][:, None, :]
    rows, cols = torch.arange(B)[:, None], torch.arange(N)[None, :]
    positive = ((rows + case.shift) % max(N, 1) == cols) if case.shift >= 0 else torch.zeros(B, N, dtype=torch.bool)
    allowed = torch.ones(G, B, N, dtype=torch.bool)
    if case.pairs == 1:
        allowed = (rows != cols).expand(G, B, N)
    if case.pairs >= 2:
        allowed = v["row_ids"][:, :, None] != v["col_ids"][:, None, :]
    if case.pairs == 3:
        allowed = allowed | positive
    allowed = allowed & ~holes[:, :, None]

    def lse(dim):
        some = allowed.any(dim, keepdim=True)
        masked = torch.where(allowed, scores.clamp(-case.clip, case.clip), -torch.inf)
        value = torch.logsumexp(torch.where(some, masked, 0.0), dim)
        return torch.where(some.squeeze(dim), value, -torch.inf)

    signed = torch.where(positive, -scores, scores) if case.stats & SIGNED else scores
    out = {
        "row_lse": lse(2),
        "col_lse": lse(1),
        "row_softplus": torch.where(allowed, F.softplus(signed, threshold=1e4), 0.0).sum(2),
    }
    terms = {"g_row": out["row_lse"], "g_col": out["col_lse"], "g_soft": out["row_softplus"]}
    loss = sum((t.nan_to_num(neginf=0.0) * w[k].to(dtype)).sum() for k, t in terms.items() if w[k] is not None)
    if w["g_pos"] is not None:
        loss = loss + (torch.where(positive, scores, 0.0).sum(2) * w["g_pos"].to(dtype)).sum()
    names = ["x", "y", "scale", "row_bias", "col_bias"]
    if isinstance(loss, int):
        return out, {k: torch.zeros_like(leaf[k]) for k in names if k in leaf}, torch.ones(G)
    *got, dscores = torch.autograd.grad(loss, [*(leaf[k] for k in names if k in leaf), scores])
    grads = dict(zip([k for k in names if k in leaf], got, strict=True))
    return out, grads, (dscores * dots).abs().sum((1, 2))


def measured(case: Case, v: dict, w: dict) -> tuple[dict, dict]:
    v, w = ({k: None if t is None else t.to(DEVICE) for k, t in d.items()} for d in (v, w))
    sides = (v["row_ids"], v["col_ids"], case.pairs, case.shift)
    head = (v["x"], v["y"], v["scale"], v["row_bias"], v["col_bias"], *sides)
    lses = triton_forward.stats(*head, case.stats, case.clip)
    signed = bool(case.stats & SIGNED)
    saved = [t if t.numel() or case.stats & bit else None for t, bit in zip(lses, (ROW_LSE, COL_LSE), strict=False)]
    grads = triton_backward.grad(*head, *saved, w["g_row"], w["g_col"], w["g_soft"], w["g_pos"], signed)
    return (
        {k: t.cpu() for k, t in zip(("row_lse", "col_lse", "row_softplus"), lses, strict=True)},
        {k: t.cpu() for k, t in zip(("x", "y", "scale", "row_bias", "col_bias"), grads, strict=True)},
    )


def failures(case: Case, seed: int) -> list[str]:
    v = inputs(case, seed)
    w = weights(case, seed, v["scale"].dtype)
    out, grads = measured(case, v, w)
    again = measured(case, v, w)
    found = [
        f"{k}: two runs differ"
        for first, second in ((out, again[0]), (grads, again[1]))
        for k in first
        if not torch.equal(first[k].nan_to_num(7.0), second[k].nan_to_num(7.0))
    ]
    exact_out, exact_grads, terms = oracle(case, v, w, torch.float64)
    plain_out, plain_grads, _ = oracle(case, v, w, case.dtype)
    requested = {"row_lse": ROW_LSE, "col_lse": COL_LSE, "row_softplus": SOFTPLUS}
    for k, bit in requested.items():
        if not case.stats & bit:
            if out[k].shape != (0,):
                found.append(f"{k}: not requested, shape {tuple(out[k].shape)}")
            continue
        err, plain = distance(out[k], exact_out[k]), distance(plain_out[k], exact_out[k])
        if not err <= 2 * min(plain, 1.0) + 1e-6:
            found.append(f"{k}: error {err:.2e}, plain torch {plain:.2e}")
    if case.clip < math.inf:  # clipped statistics have no gradient
        return found
    for k, exact in exact_grads.items():
        size = terms if k == "scale" else None
        err, plain = distance(grads[k], exact, size), distance(plain_grads[k], exact, size)
        if not err <= 2 * min(plain, 1.0) + 1e-6:
            found.append(f"d{k}: error {err:.2e}, plain torch {plain:.2e}")
    for k in ("x", "y"):
        if grads[k].dtype != v["scale"].dtype:  # the accumulation type, until the incoming gradient is multiplied in
            found.append(f"d{k}: dtype {grads[k].dtype}")
    return found


def main() -> int:
    prepare()
    triton_common.CHUNK_BYTES, triton_common.LEAST_ROWS = 64 * 45 * 4, 1
    bad = 0
    for seed, case in zip(count(), CASES, strict=False):
        for line in failures(case, seed):
            bad += 1
            print(f"{case}: {line}")
    print(f"dot_critic: {len(CASES)} interpreter cases, {bad} failures")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
