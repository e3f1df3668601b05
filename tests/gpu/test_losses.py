"""Every loss on every backend of the device, against the definition in fp64 on the CPU.

The error of a result (a value or a gradient, in norm) may be at most twice that of the definition in the same precision
on the same device, plus one part in a million or, in 16 bits, half a rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _ids(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[-2], device=x.device) // 3).expand(x.shape[:-1])


LOSSES: dict[str, Callable[..., Tensor]] = {
    "one-sided": lambda x, y, z: mk.info_nce(x, y, temperature=0.2),
    "symmetric": lambda x, y, z: mk.info_nce(x, y, temperature=0.2, symmetric=True),
    "rows": lambda x, y, z: mk.info_nce(x, y, temperature=0.2, reduction="none").square().sum(),
    "ids": lambda x, y, z: mk.info_nce(x, y, temperature=0.2, query_ids=_ids(x)),
    "explicit negatives": lambda x, y, z: mk.info_nce(x, y, z, temperature=0.2),
    "clip": lambda x, y, z: mk.clip_loss(x / 9, y, 2.0),
    "siglip": lambda x, y, z: mk.siglip_loss(x / 9, y, 2.0, -3.0),
    "nt_xent": lambda x, y, z: mk.nt_xent(x, y),
    "club": lambda x, y, z: gaussian_club(x, z, y).sum(),
    "mmd": lambda x, y, z: mk.mmd(x, y + 0.5, bandwidth=(5.0, 9.0)).sum(),
    "gaussian_mmd": lambda x, y, z: mk.gaussian_mmd(x).sum(),
    "hsic": lambda x, y, z: mk.hsic(x, y + x, bandwidth=7.0).sum(),
}
SHAPES = {"quick": (1, 5, 3), "odd": (2, 67, 33), "wide": (1, 131, 160)}


def evaluate(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    given = [t.detach().clone().requires_grad_() for t in leaves]
    value = loss(*given)
    found = torch.autograd.grad(value.sum(), given, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, given, strict=True))]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Relative errors: of the value, and of each gradient relative to the largest gradient."""
    wide = [t.double().cpu() for t in got]
    assert all(t.isfinite().all() for t in wide)
    scales = [max(float(want[0].norm()), 1e-3), *[max(float(w.norm()) for w in want[1:])] * (len(want) - 1)]
    return [float((g - w).norm()) / s for g, w, s in zip(wide, want, scales, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_as_exact_as_its_definition(device, device_backend, name, dtype, shape):
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(SHAPES[shape], generator=generator).to(dtype) for _ in range(3)]
    with mk.use_backend("reference"):
        exact = [t.double() for t in evaluate(LOSSES[name], [t.double() for t in leaves])]
        plain = errors(evaluate(LOSSES[name], [t.to(device) for t in leaves]), exact)
    with mk.use_backend(device_backend):
        try:
            found = evaluate(LOSSES[name], [t.to(device) for t in leaves])
        except RuntimeError as error:
            if "was requested but cannot run" not in str(error):
                raise
            pytest.skip(str(error))
    part = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 1e-6
    for i, (ours, theirs) in enumerate(zip(errors(found, exact), plain, strict=True)):
        assert ours <= 2 * theirs + part, ("value" if i == 0 else f"gradient {i}", ours, theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_the_bits_are_the_same_twice(device, device_backend, name):
    leaves = [torch.randn(2, 67, 33, device=device) for _ in range(3)]
    with mk.use_backend(device_backend):
        try:
            first, second = (evaluate(LOSSES[name], leaves) for _ in range(2))
        except RuntimeError as error:
            if "was requested but cannot run" not in str(error):
                raise
            pytest.skip(str(error))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
