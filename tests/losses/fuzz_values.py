"""Values and gradients of the losses on random calls, against plain formulas in fp64.

`python -m tests.losses.fuzz_values --calls 20000 [--seed S]` prints every call that fails; the test suite runs a few
hundred.

Each call draws a loss, a dtype, sizes, group dimensions, strides, a normalisation, the scale of the scores and the
magnitude of the features. The formula is evaluated in fp64 on the inputs' exact values. With u the unit roundoff of the
sums (fp32 or fp64), the allowed errors are derived from the sums:

* A score is a sum of D products with an error of at most (D + 4) u s |x||y|, where s is its scale. The errors of a
  log-sum-exp, a softplus and a positive score are at most as large, and the relative error of a sum of N exponentials
  is N u. A loss is a mean of such rows. The error of the scores is E = (D + 8) u max s |x||y|.
* A gradient is s sum_j dS_ij y_j, where dS is a softmax or sigmoid minus the positives' part. Errors of the scores
  change the softmax by at most a factor exp(2 E), dS is rounded to the products' type, and terms may cancel. So the
  error is compared with T, the sum of the absolute terms, never with the gradient, which may be 0. It is at most
  (exp(2 E) - 1 + (N + 8) u + 4 v) T, where v is the unit roundoff of the inputs' dtype.

In practice errors of sums grow as the root of the number of terms, so the bounds have room. Wrong formulas, strides,
groups, gradients and cancellations exceed them by orders of magnitude.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOSSES = ("info_nce", "symmetric", "ids", "rows", "negatives", "paired", "clip", "siglip", "nt_xent", "sup_con", "dot")


@dataclass
class Call:
    seed: int
    loss: str
    dtype: torch.dtype
    groups: tuple[int, ...]
    batch: int
    dim: int
    strides: tuple[str, str]
    normalize: bool
    factor: float  # scale of the scores
    size: float  # magnitude of the features
    near: bool  # y is x plus noise, so that positives are the best candidates
    learnable: bool  # the scale is a tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if k != "extra")


def drawn(seed: int) -> Call:
    g = torch.Generator().manual_seed(seed)
    pick = lambda of: of[int(torch.randint(len(of), (), generator=g))]  # noqa: E731
    loss = pick(LOSSES)
    groups = pick([(), (), (2,), (3,), (2, 2), (1, 3)])
    if loss == "sup_con":
        groups = ()
    normalize = loss == "nt_xent" or (loss not in ("clip", "siglip", "sup_con") and pick([True, False]))
    size = pick([1.0, 1.0, 1e-3, 30.0]) if not normalize else pick([1.0, 1e-2, 100.0])
    return Call(
        seed, loss, pick(DTYPES), groups, pick([1, 2, 3, 5, 8, 16, 17, 33, 70]), pick([1, 2, 3, 5, 8, 16, 33, 64, 129]),
        (pick(["plain", "transposed", "sliced", "expanded"]), pick(["plain", "transposed", "sliced", "gapped"])),
        normalize, pick([0.1, 1.0, 5.0, 14.3, 100.0]), size, pick([True, False]), pick([True, False]),
    )  # fmt: skip


def _strided(t: Tensor, kind: str) -> Tensor:
    """The same values with other strides; "expanded" also makes all groups equal."""
    if kind == "transposed":
        return t.mT.contiguous().mT
    if kind == "sliced":
        return torch.cat([t, t], -1)[..., : t.shape[-1]]
    if kind == "gapped":
        return t.repeat_interleave(2, -2)[..., ::2, :]
    if kind == "expanded" and t.dim() > 2:  # the groups share their features
        return t[(0,) * (t.dim() - 2)].expand(t.shape)
    return t


def inputs(call: Call) -> tuple[Tensor, Tensor, Tensor | float]:
    g = torch.Generator().manual_seed(call.seed + 1)
    shape = (*call.groups, call.batch, call.dim)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    y = torch.randn(shape, generator=g, dtype=torch.float64)
    y = x + 0.2 * y if call.near else y
    if not call.normalize:  # rows of about unit length, so that the scale determines the size of the scores
        x, y = x / call.dim**0.5, y / call.dim**0.5
        factor = call.factor / call.size**2
    else:
        factor = call.factor
    x, y = (_strided((call.size * t).to(call.dtype), kind) for t, kind in zip((x, y), call.strides, strict=True))
    batch = call.batch
    call.extra["ids"] = torch.randint(0, batch // 2 + 1, (*call.groups, batch), generator=g)
    rest = torch.randn((*call.groups, *((batch,) if call.loss == "paired" else ()), 5, call.dim), generator=g)
    rest = rest if call.normalize else rest * call.size / call.dim**0.5
    call.extra["rest"] = rest.to(call.dtype)
    call.extra["mask"] = torch.rand(*call.groups, batch, 5, generator=g) < 0.7
    return x.detach().requires_grad_(), y.detach().requires_grad_(), _scale(call, factor)


def _scale(call: Call, factor: float) -> Tensor | float:
    if not call.learnable:
        return factor
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    shape = call.groups if call.seed % 2 and call.loss != "sup_con" else ()
    return torch.full(shape, factor, dtype=wide, requires_grad=True)


def ours(call: Call, x: Tensor, y: Tensor, scale: Any) -> Tensor:
    extra, temperature = call.extra, 1 / scale
    options: dict[str, Any] = {"temperature": temperature, "normalize": call.normalize}
    table: dict[str, Callable[[], Tensor]] = {
        "info_nce": lambda: mk.info_nce(x, y, **options),
        "symmetric": lambda: mk.info_nce(x, y, symmetric=True, **options),
        "ids": lambda: mk.info_nce(x, y, query_ids=extra["ids"], **options),
        "rows": lambda: mk.info_nce(x, y, reduction="none", symmetric=bool(call.seed % 3), **options).mean(),
        "negatives": lambda: mk.info_nce(x, y, extra["rest"], in_batch=bool(call.seed % 3), **options),
        "paired": lambda: mk.info_nce(
            x, y, extra["rest"], negative_mode="paired", negative_mask=extra["mask"], **options
        ),
        "clip": lambda: mk.clip_loss(x, y, scale),
        "siglip": lambda: mk.siglip_loss(x, y, scale, -1.0),
        "nt_xent": lambda: mk.nt_xent(x, y, temperature),
        "sup_con": lambda: mk.sup_con(
            torch.stack([x, y], 1), extra["ids"], temperature=temperature, base_temperature=1.0
        ),
        "dot": lambda: -mk.InfoNCE(mk.DotCritic(temperature if not isinstance(scale, Tensor) else 1.0, call.normalize))(
            x, y
        ).mean(),
    }
    return table[call.loss]()


class Score(NamedTuple):
    """Scores that enter a loss, and the features that they are products of."""

    scores: Tensor
    rows: Tensor
    columns: Tensor
    columns_are: str  # "y", "rest" (separate negatives), "own rest" (each query's own) or "views"


def formula(call: Call, x: Tensor, y: Tensor, scale: Any) -> tuple[Tensor, Tensor, list[Score]]:
    """A loss in fp64 as two parts, the first minus the second (log-sum-exps or softplus; positives), and its scores."""
    rest, mask, ids = call.extra["rest"].to(x.dtype), call.extra["mask"], call.extra["ids"]
    scale = scale[..., None, None] if isinstance(scale, Tensor) and scale.dim() else scale
    if call.normalize:
        x, y, rest = (F.normalize(t, dim=-1) for t in (x, y, rest))
    if call.loss in ("nt_xent", "sup_con"):
        return _of_views(call, torch.cat([x, y], -2), scale)
    scores = (x @ y.mT) * scale
    used = [Score(scores, x, y, "y")]
    eye = torch.eye(call.batch, dtype=torch.bool)
    positive = scores.diagonal(dim1=-2, dim2=-1)
    if call.loss == "siglip":  # softplus(-z) = softplus(z) - z for the positives
        z = scores - 1.0
        return F.softplus(z, threshold=40.0).sum(-1).mean(), z.diagonal(dim1=-2, dim2=-1).mean(), used
    if call.loss in ("symmetric", "clip") or (call.loss == "rows" and call.seed % 3):
        return (scores.logsumexp(-1).mean() + scores.logsumexp(-2).mean()) / 2, positive.mean(), used
    if call.loss == "ids":
        same = (ids[..., :, None] == ids[..., None, :]) & ~eye
        return scores.masked_fill(same, -torch.inf).logsumexp(-1).mean(), positive.mean(), used
    if call.loss == "dot":
        return scores.logsumexp(-1).mean() - math.log(call.batch), positive.mean(), used
    if call.loss in ("negatives", "paired"):
        together = call.loss == "negatives" and call.seed % 3
        if call.loss == "negatives":
            more = (x @ rest.mT) * scale
        else:
            more = ((rest @ x[..., None]).squeeze(-1) * scale).masked_fill(~mask, -torch.inf)
        used.append(Score(more, x, rest, "rest" if call.loss == "negatives" else "own rest"))
        candidates = torch.cat([scores if together else positive[..., None], more], -1)
        return candidates.logsumexp(-1).mean(), positive.mean(), used
    return scores.logsumexp(-1).mean(), positive.mean(), used


def _of_views(call: Call, views: Tensor, scale: Any) -> tuple[Tensor, Tensor, list[Score]]:
    n, own = views.shape[-2], torch.eye(views.shape[-2], dtype=torch.bool)
    scores = (views @ views.mT) * scale
    lse = scores.masked_fill(own, -torch.inf).logsumexp(-1).mean()
    used = [Score(scores, views, views, "views")]
    if call.loss == "nt_xent":
        return lse, scores.diagonal(n // 2, -2, -1).mean(), used
    ids = call.extra["ids"].repeat(2)
    match = ((ids[:, None] == ids) & ~own).to(views.dtype)
    return lse / scale, ((match * scores).sum(-1) / match.sum(-1)).mean() / scale, used


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def excess(call: Call) -> dict[str, float]:
    """The ratio of every error to its bound; a ratio above 1 is a failure."""
    x, y, scale = inputs(call)
    value = ours(call, x, y, scale)
    found = torch.autograd.grad(value, [x, y])
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    factor = scale.detach().double() if isinstance(scale, Tensor) else scale
    if call.loss == "dot" and isinstance(scale, Tensor):
        factor = 1.0
    *parts, used = formula(call, *wide, factor)
    expected = parts[0] - parts[1]
    gradients = torch.autograd.grad(expected, wide, retain_graph=True)

    products, sums = unit(call.dtype), unit(torch.float64 if call.dtype == torch.float64 else torch.float32)
    largest = float(factor.max()) if isinstance(factor, Tensor) else factor
    longest = max(float((s.rows.norm(dim=-1).max() * s.columns.norm(dim=-1).max()).detach()) for s in used) * largest
    # Normalised features are rounded once more, to the type of the products.
    of_score = ((call.dim + 8) * sums + (2 * products if call.normalize else 0.0)) * (longest + 1)
    of_value = {"sup_con": 1 / largest, "siglip": 2.0 * call.batch}.get(call.loss, 2.0) * of_score
    absolute = sum(abs(float(part.detach())) for part in parts)
    candidates = max(s.scores.shape[-1] for s in used)
    of_value += (candidates + 8) * sums * (absolute + 2)
    result = {"value": abs(float(value.detach()) - float(expected.detach())) / of_value}
    relative = math.expm1(min(2 * of_score, 700)) + (candidates + 8) * sums + 4 * products
    bounds = terms(call, parts, used, wide, largest)
    for name, g, reference, bound in zip("xy", found, gradients, bounds, strict=True):
        limits = torch.finfo(call.dtype)
        error = (g.double().clamp(limits.min, limits.max) - reference.clamp(limits.min, limits.max)).abs()
        tiny = limits.smallest_normal  # below this, the dtype has no relative precision
        result[name] = float((error / (relative * bound + tiny)).max())
    return result


def terms(call: Call, parts: list[Tensor], used: list[Score], wide: list[Tensor], scale: float) -> list[Tensor]:
    """Sums of the absolute terms of the gradients of x and y, [*, B, 1] each: s sum_j |dS_ij| |y_j|; y likewise.
    dS counts with the absolute values of its parts from the log-sum-exps and from the positives."""
    found = [torch.zeros_like(t[..., :1]) for t in wide]
    slopes = [torch.zeros_like(s.scores) for s in used]
    for part in parts:
        for total, ds in zip(slopes, _slopes(part, used), strict=True):
            total += ds.abs() * scale
    for ds, (_, a, b, columns_are) in zip(slopes, used, strict=True):
        of_a, of_b = (t.detach().norm(dim=-1, keepdim=True) for t in (a, b))
        if columns_are == "own rest":
            found[0] += (ds[..., None] * of_b).sum(-2)
            continue
        by_a, by_b = ds @ of_b, ds.mT @ of_a
        if columns_are == "views":
            found = [t + part for t, part in zip(found, (by_a + by_b).split(call.batch, -2), strict=True)]
            continue
        found[0] += by_a
        if columns_are == "y":
            found[1] += by_b
    if call.normalize:
        found = [t / w.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12) for t, w in zip(found, wide, strict=True)]
    return found


def _slopes(part: Tensor, used: list[Score]) -> list[Tensor]:
    scores = [s.scores for s in used]
    found = torch.autograd.grad(part, scores, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(s) if g is None else g for g, s in zip(found, scores, strict=True)]


def failures(calls: int, seed: int) -> list[str]:
    found = []
    for k in range(seed, seed + calls):
        call = drawn(k)
        try:
            ratios = excess(call)
        except Exception as error:  # the report names the call
            found.append(f"{call}: {type(error).__name__}: {error}")
            continue
        if not all(r <= 1 for r in ratios.values()):
            found.append(f"{call}: " + ", ".join(f"{k} {v:.3g}" for k, v in ratios.items()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, bad = time.perf_counter(), failures(options.calls, options.seed)
    print("\n".join(bad))
    print(f"{len(bad)} of {options.calls} calls failed, {time.perf_counter() - start:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
