"""On a real GPU: no loss synchronises with the device, and losses with their gradients replay from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.club.api import gaussian_club

LOSSES: dict[str, Callable[..., Tensor]] = {
    "one-sided": lambda x, y, t: mk.info_nce(x, y, temperature=t.exp()),
    "symmetric": lambda x, y, t: mk.info_nce(x, y, temperature=t.exp(), symmetric=True),
    "clip": lambda x, y, t: mk.clip_loss(x, y, t.exp()),
    "siglip": lambda x, y, t: mk.siglip_loss(x, y, t.exp(), t),
    "nt_xent": lambda x, y, t: mk.nt_xent(x, y, t.exp()),
    "club": lambda x, y, t: gaussian_club(x, t.expand_as(x), y),
    "mmd": lambda x, y, t: mk.mmd(x, y, bandwidth=t.exp()),
    "hsic": lambda x, y, t: mk.hsic(x, y, bandwidth=t.exp()),
    "infonce, concat": lambda x, y, t: t * 0 - mk.InfoNCE(_concat(x))(x, y),
}
_CRITICS: dict[tuple, mk.ConcatCritic] = {}


def _concat(x: Tensor) -> mk.ConcatCritic:
    key = (x.shape[-1], x.dtype, x.device)
    if key not in _CRITICS:
        _CRITICS[key] = mk.ConcatCritic(x.shape[-1], x.shape[-1], hidden_dims=(16, 16)).to(x.device, x.dtype)
    return _CRITICS[key]


def leaves(gpu: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(gpu, dtype)  # noqa: E731
    return [draw(70, 33), draw(70, 33), draw().abs()]


def step(name: str, given: list[Tensor]) -> list[Tensor]:
    value = LOSSES[name](*given)
    found = torch.autograd.grad(value, given, allow_unused=True)
    return [value.detach(), *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(gpu, device_backend, name, dtype):
    given = [t.requires_grad_() for t in leaves(gpu, dtype)]
    with mk.use_backend(device_backend):
        step(name, given)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(name, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_step_replays_on_new_inputs(gpu, device_backend, name, dtype):
    given = [t.requires_grad_() for t in leaves(gpu, dtype)]
    with mk.use_backend(device_backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(name, given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(name, given)
        with torch.no_grad():
            for t, new in zip(given, leaves(gpu, dtype, seed=1), strict=True):
                t.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        want = step(name, [t.detach().clone().requires_grad_() for t in given])
    for a, b in zip(captured, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["one-sided", "symmetric"])
def test_few_kernels_at_small_batches(gpu, name):
    if mk.backends()["triton"] != "available":
        pytest.skip(mk.backends()["triton"])
    given = [t.requires_grad_() for t in leaves(gpu, torch.bfloat16)[:2]]
    run = lambda: torch.autograd.grad(mk.info_nce(*given, symmetric=name == "symmetric"), given)  # noqa: E731
    with mk.use_backend("triton"):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= 18, [e.name for e in kernels]
