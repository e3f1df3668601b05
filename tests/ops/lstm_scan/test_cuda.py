"""The LSTM scan's CUDA kernels, run on the CPU by the emulator, against the definition in fp64.

The emulated kernels hold at most 512 weights of a slice in shared memory. Up to H = 22 a block has all units; with
more, blocks share them and synchronise in every step; with few processors the weight is read through the cache.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mi_kernels.ops.common.arguments import split
from mi_kernels.ops.lstm_scan import reference
from mi_kernels.ops.lstm_scan.problem import Scan, Slopes, Start, States
from tests.cuda_emulator import build
from tests.cuda_emulator.operators import poisoned

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="the CUDA emulator needs g++")
ALL_GRADIENTS = 15
# G, B, T, H, steps with an input, processors
CASES = [
    (1, 1, 1, 1, 1, 8),
    (1, 5, 4, 3, 4, 8),
    (2, 9, 3, 22, 3, 2),  # a block has all units, two blocks run at once
    (1, 70, 2, 5, 2, 1),
    (1, 6, 3, 33, 3, 6),  # three slices
    (2, 5, 3, 40, 1, 8),  # four slices, rows of two groups, no input after the first step
    (1, 20, 2, 37, 2, 3),  # rows of four launches, one after the other
    (1, 5, 3, 67, 3, 4),  # would need more slices than processors: the weight is not staged
    (1, 3, 2, 70, 2, 1),
]


@pytest.fixture(scope="module")
def schedule() -> Iterator[ctypes.CDLL]:
    for kernels in poisoned("lstm_scan"):
        yield kernels.schedule


def draw(case: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    G, B, _, H, inputs, _ = case
    shapes = ((G, B, inputs, 4 * H), (G, 4 * H, H), (G, 4 * H), (G, B, H), (G, B, H))
    return [(torch.randn(s) * (H**-0.5 if k == 1 else 1)).to(dtype) for k, s in enumerate(shapes)]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(case: tuple[int, ...], dtype: torch.dtype, states: bool, lengths: Tensor | None) -> None:
    G, B, T, H, inputs, processors = case
    gates, weight, *rest = draw(case, dtype)
    if lengths is not None:
        past = torch.arange(inputs) >= lengths.unsqueeze(-1)
        gates = gates.masked_fill(past.unsqueeze(-1), math.nan)
    bias, h0, c0 = rest if states else (None, None, None)
    ops = torch.ops.mi_kernels_cuda
    found = ops.lstm_scan_forward(gates, weight, bias, h0, c0, lengths, T, True, processors)
    wide = [None if t is None else t.double() for t in (gates, weight, bias, h0, c0)]
    expected = reference.forward(Scan(*wide, lengths), T, True)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-6
    slopes = [torch.randn(G, B, T, H) for _ in range(2)]
    if not states:
        slopes[1] = None  # type: ignore[call-overload]
    problem = (weight, h0, c0, lengths, *found, *slopes, inputs, ALL_GRADIENTS)
    oracle = (wide[1], *wide[3:], lengths, *expected, *(None if g is None else g.double() for g in slopes))
    gradients = ops.lstm_scan_backward(*problem, processors)
    wanted = reference.backward(*split(oracle, Start, States, Slopes), inputs, ALL_GRADIENTS)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.shape == b.shape and error(a, b) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernels_equal_the_definition(schedule, case: tuple[int, ...]) -> None:
    schedule(0, 0)
    check(case, torch.float32, True, None)
    check(case, torch.float32, False, torch.randint(0, case[2] + 1, case[:2]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("case", CASES[2:5])
def test_no_order_of_threads_shows(schedule, case: tuple[int, ...], order: tuple[int, int]) -> None:
    schedule(*order)
    check(case, torch.float32, True, torch.randint(0, case[2] + 1, case[:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_inputs_are_scanned_in_fp32(schedule, dtype: torch.dtype) -> None:
    schedule(0, 0)
    check(CASES[1], dtype, True, None)


def test_fp64_is_refused(schedule) -> None:
    gates, weight, *_ = draw(CASES[1], torch.float64)
    with pytest.raises(RuntimeError, match="fp64"):
        torch.ops.mi_kernels_cuda.lstm_scan_forward(gates, weight, None, None, None, None, 4, False, 8)
