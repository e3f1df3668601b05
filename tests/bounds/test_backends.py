"""Every combination of critic, bound, backend, dtype and shape against the definition in fp64.

The error of a result (a value or a gradient, in norm, over all shapes together) may be at most twice that of plain
torch in the same precision, plus one part in a million or, in 16 bits, one rounding: plain torch's error may be 0 by
chance. Errors are relative: of values to 1, the size of the scores; of gradients to the longest gradient, but in fp32
at least to 1, because the last bias's gradient sums score gradients that add up to 1 and cancel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.backends import extension_status

BACKENDS = ["chunked", *(["cpu"] if extension_status() == "available" else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CRITICS: dict[str, Callable[[], nn.Module]] = {
    "dot": lambda: mk.DotCritic(temperature=2.0),
    "cosine": lambda: mk.DotCritic(temperature=0.2, normalize=True),
    "bilinear": lambda: mk.BilinearCritic(5, 5),
    "separable": lambda: mk.SeparableCritic(5, 5, hidden_dims=(8,), embed_dim=6),
    "concat": lambda: mk.ConcatCritic(5, 5, hidden_dims=(9, 7), memory_budget=900),
    "concat, one layer": lambda: mk.ConcatCritic(5, 5, hidden_dims=(9,), activation="gelu"),
}
BOUNDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "infonce": mk.InfoNCE,
    "nce_club": mk.NCECLUB,
    "nwj": mk.NWJ,
    "tuba": mk.TUBA,
    "dv": mk.DonskerVaradhan,
    "mine": mk.MINE,
    "js": mk.JensenShannon,
    "smile": lambda critic: mk.SMILE(critic, clip=0.5),
    "interpolated": mk.InterpolatedBound,
}
SHAPES = [(2,), (13,), (2, 7), (1, 67)]


def evaluate(
    bound: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Values of forward and learning_loss, and the gradients of a weighted sum of both."""
    bound = copy.deepcopy(bound).to(dtype)
    leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
    parameters = [*leaves, *bound.parameters()]
    with mk.use_backend(backend):
        values = [bound(*leaves), bound.learning_loss(*leaves)]
        # Unequal weights, because learning_loss is often the negative of forward.
        total = values[0].double().sum() + 3 * values[1].double().sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    kept = [torch.zeros(()) if g is None else g for g in gradients]
    return [v.detach().double() for v in values], [g.double() for g in kept]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("critic", CRITICS)
def test_every_backend_is_as_exact_as_plain_torch(critic: str, bound: str, dtype: torch.dtype, backend: str) -> None:
    module = BOUNDS[bound](CRITICS[critic]())
    part = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 1e-6
    errors: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for shape in SHAPES:
        # A view of a wider tensor, so that rows are not contiguous.
        x, y = (torch.randn(*shape, 6, dtype=torch.float64)[..., 1:].to(dtype).double() for _ in range(2))
        rounded = copy.deepcopy(module).to(dtype).double()
        exact = evaluate(rounded, x, y, torch.float64, "reference")
        plain = evaluate(rounded, x, y, dtype, "reference")
        found = evaluate(rounded, x, y, dtype, backend)
        for kind in ("value", "gradient"):
            least = 1e-3 if kind == "gradient" and dtype.itemsize == 2 else 1.0
            triples = list(zip(*(result[kind == "gradient"] for result in (found, plain, exact)), strict=True))
            scale = max(least, *(float(e.norm()) for _, _, e in triples))
            for k, (f, p, e) in enumerate(triples):
                assert f.isfinite().all()
                errors.setdefault((kind, k), []).append((float((f - e).norm()) / scale, float((p - e).norm()) / scale))
    for which, pairs in errors.items():
        ours, theirs = (math.hypot(*column) for column in zip(*pairs, strict=True))
        assert ours <= 2 * theirs + part, which
