"""Attention and LSTM scans on every backend of the device, against the definition in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mi_kernels as mk

from .test_losses import DTYPES, errors, evaluate

Shapes = list[tuple[int, ...]]


def _attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    lengths = (torch.arange(q.shape[0], device=q.device) + k.shape[2] // 2).clamp(max=k.shape[2])
    return mk.cross_attention(q, k, v, key_lengths=lengths, **options).square().sum()


def _grouped(*sides: Tensor) -> Tensor:
    found = mk.cross_attention_grouped(sides[:2], sides[2:4], sides[4:], causal_offset=[None, 4])
    return torch.stack([out.square().sum() for out in found]).sum()


def _scan(gates: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, c0: Tensor) -> Tensor:
    lengths = torch.arange(gates.shape[0], device=gates.device) % (gates.shape[1] + 1)
    h, c = mk.lstm_scan(gates, weight, bias, h0, c0, lengths=lengths)
    return h.square().sum() + c.square().sum()


def _layer(*problem: Tensor) -> Tensor:
    h, c = mk.lstm(*problem)
    return h.square().sum() + c.square().sum()


def _decode(*problem: Tensor) -> Tensor:
    return mk.lstm_decode(*problem, 7).square().sum()


def _heads(*sizes: tuple[int, int]) -> Shapes:
    return [(3, 2, steps, features) for steps, features in sizes]


def _gates(hidden: int) -> Shapes:
    return [(4 * hidden, hidden), (4 * hidden,)]


PROBLEMS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "narrow heads, quick": (_attention, _heads((5, 4), (7, 4), (7, 4))),
    "narrow heads": (lambda *t: _attention(*t, causal_offset=9), _heads((67, 10), (75, 10), (75, 7))),
    "wide heads": (lambda *t: _attention(*t, causal_offset=9), _heads((67, 64), (75, 64), (75, 40))),
    "sparsemax": (lambda *t: _attention(*t, normalizer="sparsemax"), _heads((67, 10), (75, 10), (75, 7))),
    "sparsemax, wide": (lambda *t: _attention(*t, normalizer="sparsemax"), _heads((67, 48), (75, 48), (75, 40))),
    "several pairs": (_grouped, _heads((50, 5), (33, 5), (33, 5), (50, 5), (33, 5), (50, 5))),
    "scan": (_scan, [(9, 13, 80), *_gates(20), (9, 20), (9, 20)]),
    "scan, wide": (_scan, [(35, 9, 800), *_gates(200), (35, 200), (35, 200)]),
    "layer": (_layer, [(9, 13, 21), (80, 21), *_gates(20), (80,)]),
    "decoder": (_decode, [(9, 20), (80, 20), *_gates(20), (80,)]),
}


def drawn(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    leaves = []
    for shape in PROBLEMS[name][1]:
        weight = len(shape) == 2 and shape[0] % 4 == 0 and shape[0] > shape[1]
        size = shape[1] ** -0.5 if weight else 1.0
        leaves.append((size * torch.randn(shape, generator=generator)).to(dtype))
    return leaves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_sequence_is_as_exact_as_its_definition(device, device_backend, name, dtype):
    run, leaves = PROBLEMS[name][0], drawn(name, dtype)
    with mk.use_backend("reference"):
        exact = [t.double() for t in evaluate(run, [t.double() for t in leaves])]
        plain = errors(evaluate(run, [t.to(device) for t in leaves]), exact)
    found = errors(on_device(run, leaves, device, device_backend), exact)
    part = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    for i, (ours, theirs) in enumerate(zip(found, plain, strict=True)):
        assert ours <= 2 * theirs + part, ("value" if i == 0 else f"gradient {i}", ours, theirs)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bits_are_the_same_twice(device, device_backend, name):
    run, leaves = PROBLEMS[name][0], drawn(name, torch.float32)
    first, second = (on_device(run, leaves, device, device_backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def on_device(run: Callable[..., Tensor], leaves: list[Tensor], device: torch.device, backend: str) -> list[Tensor]:
    with mk.use_backend(backend):
        try:
            return evaluate(run, [t.to(device) for t in leaves])
        except RuntimeError as error:
            if "was requested but cannot run" not in str(error):
                raise
            pytest.skip(str(error))
