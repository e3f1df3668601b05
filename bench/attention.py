"""Times attention between modalities on a CPU, forward plus backward, with its arithmetic floor and common
alternatives.

`python -m bench.attention [--quick] [--only mult|lengths|sparsemax|dropout|wide]` prints tables and writes
bench/results/cpu_attention.json. The sizes of `mult` are MulT's: batch 32, 10 heads of 4 features, sequences of 50, 375
and 500 steps, all six directed pairs. The floor is the arithmetic alone, in the same run: two torch.exp per weight on
arrays that stay in cache, and torch.matmul of 512 x 512 matrices for 2 (4 E + 3 Ev) FLOP per weight (the scores twice).
Every contender is checked against the definition in fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk

from . import machine, table

STEPS = (50, 375, 500)


class Pairs(NamedTuple):
    """Queries, keys, values and parameters of several directed pairs."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    key_lengths: list[Tensor | None]
    offsets: list[int | None]

    def tensors(self) -> list[Tensor]:
        return [*self.queries, *self.keys, *self.values]

    def weights(self) -> int:
        return sum(q.shape[:3].numel() * k.shape[2] for q, k in zip(self.queries, self.keys, strict=True))

    def masks(self) -> list[Tensor | None]:
        """Masks for scaled_dot_product_attention; None for pairs without a mask."""
        found: list[Tensor | None] = []
        for q, k, lengths, offset in zip(self.queries, self.keys, self.key_lengths, self.offsets, strict=True):
            rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
            mask = None if lengths is None else (columns < lengths[:, None])[:, None, None]
            if offset is not None:
                causal = columns - rows <= offset
                mask = causal if mask is None else mask & causal
            found.append(mask)
        return found

    def head(self, items: int) -> Pairs:
        """The first items of every pair, in fp64."""
        cut = [[t.detach()[:items].double().requires_grad_() for t in side] for side in self[:3]]
        lengths = [None if n is None else n[:items] for n in self.key_lengths]
        return Pairs(*cut, lengths, self.offsets)


Attend = Callable[[Pairs, list[Tensor | None]], list[Tensor]]


def directed(
    batch: int, heads: int, size: int, steps: tuple[int, ...], *, half: bool = False, causal: bool = False
) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    draw = lambda t: torch.randn(batch, heads, t, size, generator=generator).requires_grad_()  # noqa: E731
    pairs = [(i, j) for i in steps for j in steps if i != j] if len(steps) > 1 else [(steps[0], steps[0])]
    # Uniform in [1, T]: half of T on average.
    lengths = [torch.randint(1, j + 1, (batch,), generator=generator) if half else None for _, j in pairs]
    return Pairs(
        [draw(i) for i, _ in pairs],
        [draw(j) for _, j in pairs],
        [draw(j) for _, j in pairs],
        lengths,
        [abs(i - j) if causal else None for i, j in pairs],
    )


def ours(pairs: Pairs, masks: list[Tensor | None], **options: Any) -> list[Tensor]:
    return mk.cross_attention_grouped(*pairs[:3], key_lengths=pairs.key_lengths, causal_offset=pairs.offsets, **options)


def sdpa(pairs: Pairs, masks: list[Tensor | None], dropout_p: float = 0.0) -> list[Tensor]:
    calls = zip(*pairs[:3], masks, strict=True)
    return [F.scaled_dot_product_attention(q, k, v, attn_mask=m, dropout_p=dropout_p) for q, k, v, m in calls]


def eager_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, normalizer: str, dropout_p: float) -> Tensor:
    """As the public code of MulT and MIRD writes it."""
    s = q * q.shape[-1] ** -0.5 @ k.mT
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if normalizer == "softmax":
        p = s.softmax(-1)
    else:
        z = s.sort(-1, descending=True).values
        total = z.cumsum(-1) - 1
        n = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        size = (n * z > total).sum(-1, keepdim=True)
        p = (s - total.gather(-1, size - 1) / size).clamp(min=0)
    return F.dropout(p, dropout_p) @ v


def eager(
    pairs: Pairs, masks: list[Tensor | None], normalizer: str = "softmax", dropout_p: float = 0.0
) -> list[Tensor]:
    return [eager_one(*call, normalizer, dropout_p) for call in zip(*pairs[:3], masks, strict=True)]


def step(attend: Attend, pairs: Pairs, masks: list[Tensor | None], slopes: list[Tensor]) -> None:
    torch.autograd.grad(attend(pairs, masks), pairs.tensors(), slopes)


def check(name: str, attend: Attend, pairs: Pairs, normalizer: str) -> None:
    """Outputs and gradients of two items against the definition in fp64."""
    wide = pairs.head(2)
    narrow = Pairs(*([t.detach().float().requires_grad_() for t in side] for side in wide[:3]), *wide[3:])
    want = ours(wide, [], normalizer=normalizer, backend="reference")
    found = attend(narrow, narrow.masks())
    slopes = [torch.randn_like(w) for w in want]
    want += torch.autograd.grad(want, wide.tensors(), slopes)
    found = [*found, *torch.autograd.grad(found, narrow.tensors(), [s.float() for s in slopes])]
    if any((f - w).norm() > 1e-4 * w.norm() for f, w in zip(found, want, strict=True)):
        raise RuntimeError(f"{name} is not the definition; no time is taken")


def floor(pairs: Pairs, exponentials: bool = True) -> None:
    """The arithmetic alone."""
    x, a, b = torch.rand(1 << 16), torch.randn(512, 512), torch.randn(512, 512)
    y, c = torch.empty_like(x), torch.empty_like(a)
    features, values = pairs.queries[0].shape[3], pairs.values[0].shape[3]
    if exponentials:
        for _ in range(-(-2 * pairs.weights() // len(x))):
            torch.exp(x, out=y)
    for _ in range(-(-pairs.weights() * (4 * features + 3 * values) // 512**3)):
        torch.matmul(a, b, out=c)


def compare(
    label: str,
    pairs: Pairs,
    contenders: dict[str, Attend],
    base: str,
    seconds: float,
    *,
    normalizer: str = "softmax",
    exact: bool = True,
) -> list[dict[str, Any]]:
    size = {
        "B": pairs.queries[0].shape[0],
        "heads": pairs.queries[0].shape[1],
        "E": pairs.queries[0].shape[3],
        "T": "/".join(str(n) for n in sorted({k.shape[2] for k in pairs.keys})),
    }
    masks, slopes = pairs.masks(), [torch.randn_like(q) for q in pairs.queries]
    steps: dict[str, Callable[[], Any]] = {}
    for name, attend in contenders.items():
        try:
            if exact:
                check(name, attend, pairs, normalizer)
        except Exception as error:
            table.left_out(label, size, name, error)
            continue
        steps[name] = partial(step, attend, pairs, masks, slopes)
    steps["floor"] = partial(floor, pairs, normalizer == "softmax")
    return table.rows(label, size, steps, base, seconds, least=3)


def compiled() -> Attend:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # one program per shape; after eight torch would fall back to eager
    one = torch.compile(eager_one, dynamic=False)
    return lambda pairs, masks: [one(*call, "softmax", 0.0) for call in zip(*pairs[:3], masks, strict=True)]


def mult(batch: int, steps: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    contenders: dict[str, Attend] = {"mi_kernels": ours, "SDPA": sdpa, "eager": eager, "torch.compile": compiled()}
    contenders["mi_kernels, a call per pair"] = lambda pairs, masks: [
        mk.cross_attention(q, k, v) for q, k, v in zip(*pairs[:3], strict=True)
    ]
    found = compare("mult", directed(batch, 10, 4, steps), contenders, "SDPA", seconds)
    masked = {"mi_kernels": ours, "SDPA": sdpa, "eager": eager}
    return found + compare("mult, masked", directed(batch, 10, 4, steps, causal=True), masked, "SDPA", seconds)


def lengths(batch: int, steps: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    contenders: dict[str, Attend] = {"mi_kernels": ours, "SDPA": sdpa, "eager": eager}
    return compare("half lengths", directed(batch, 10, 4, steps, half=True), contenders, "SDPA", seconds)


def sparsemax(batch: int, steps: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    pairs = directed(batch, 10, 4, steps)
    sparse = {"mi_kernels": partial(ours, normalizer="sparsemax"), "eager": partial(eager, normalizer="sparsemax")}
    found = compare("sparsemax", pairs, sparse, "mi_kernels", seconds, normalizer="sparsemax")
    both = {"mi_kernels": partial(ours, normalizer="sparsemax"), "mi_kernels, softmax": ours}
    return found + compare("sparsemax", pairs, both, "mi_kernels, softmax", seconds, exact=False)


def dropout(batch: int, steps: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    contenders = {
        "mi_kernels": partial(ours, dropout_p=0.1),
        "mi_kernels, no dropout": ours,
        "SDPA": partial(sdpa, dropout_p=0.1),
        "eager": partial(eager, dropout_p=0.1),
    }
    # Dropout masks differ between contenders, so results are not compared here; `mult` checks them.
    return compare("dropout 0.1", directed(batch, 10, 4, steps), contenders, "SDPA", seconds, exact=False)


def wide(quick: bool, seconds: float) -> list[dict[str, Any]]:
    found = []
    for size, length in (
        ((64, 128),) if quick else ((5, 500), (8, 500), (16, 500), (32, 500), (64, 500), (64, 2048), (128, 1024))
    ):
        pairs = directed(2, 8, size, (length,))
        found += compare("one pair", pairs, {"mi_kernels": ours, "SDPA": sdpa, "eager": eager}, "SDPA", seconds)
    return found


NOTE = (
    "Attention, fp32, forward plus backward to queries, keys and values; mult: six directed pairs between sequences of "
    "the lengths T; masked: MulT's causal offset |Tk - Tq|; half lengths: key lengths uniform in [1, T], SDPA with a "
    "mask; one pair: self-attention; floor: two exponentials and 2 (4 E + 3 Ev) FLOP per weight (no exponentials for "
    f"sparsemax), nothing else, masks not counted; {table.COLUMNS}"
)
SECTIONS = ("mult", "lengths", "sparsemax", "dropout", "wide")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--seconds", type=float, default=10.0, help="per table")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    batch, steps, seconds = (2, (10, 37, 50), 0.3) if arguments.quick else (32, STEPS, arguments.seconds)
    found: list[dict[str, Any]] = []
    for section in SECTIONS:
        if arguments.only not in (None, section):
            continue
        if section == "wide":
            found += wide(arguments.quick, seconds)
        else:
            found += {"mult": mult, "lengths": lengths, "sparsemax": sparsemax, "dropout": dropout}[section](
                batch, steps, seconds
            )
    if not arguments.quick:
        name = "cpu_attention" if arguments.only is None else f"cpu_attention_{arguments.only}"
        machine.write(name, found, NOTE)
    print("bench.attention: done")


if __name__ == "__main__":
    main()
