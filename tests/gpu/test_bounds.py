"""Every combination of critic, bound, backend and dtype on the device, against the definition in fp64 on the CPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from tests.bounds.test_backends import BOUNDS, CRITICS

SHAPES = [(13,), (2, 7), (1, 67)]


def evaluate(bound: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, backend: str) -> tuple[list, list]:
    """Values of forward and learning_loss, and gradients of a weighted sum of both, returned in fp64 on the CPU."""
    bound = copy.deepcopy(bound).to(x.device, dtype)
    leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
    parameters = [*leaves, *bound.parameters()]
    with mk.use_backend(backend):
        values = [bound(*leaves), bound.learning_loss(*leaves)]
        total = values[0].double().sum() + 3 * values[1].double().sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    kept = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return [v.detach().double().cpu() for v in values], [g.double().cpu() for g in kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("critic", CRITICS)
def test_every_backend_is_as_exact_as_plain_torch(device, device_backend, critic, bound, dtype):
    module = BOUNDS[bound](CRITICS[critic]())
    part = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 1e-6
    errors: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for shape in SHAPES:
        x, y = (torch.randn(*shape, 6, dtype=torch.float64)[..., 1:].to(dtype).double() for _ in range(2))
        rounded = copy.deepcopy(module).to(dtype).double()
        exact = evaluate(rounded, x, y, torch.float64, "reference")
        plain = evaluate(rounded, x.to(device), y.to(device), dtype, "reference")
        found = evaluate(rounded, x.to(device), y.to(device), dtype, device_backend)
        for k in range(2):
            triples = list(zip(found[k], plain[k], exact[k], strict=True))
            scale = max(1e-3 if k and dtype.itemsize == 2 else 1.0, *(float(e.norm()) for *_, e in triples))
            for i, (f, p, e) in enumerate(triples):
                assert f.isfinite().all()
                errors.setdefault((("value", "gradient")[k], i), []).append(
                    (float((f - e).norm()) / scale, float((p - e).norm()) / scale)
                )
    for which, pairs in errors.items():
        ours, theirs = (math.hypot(*column) for column in zip(*pairs, strict=True))
        assert ours <= 2 * theirs + part, which
