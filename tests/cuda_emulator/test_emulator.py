"""The emulator computes what a GPU would, and detects errors such as missing barriers."""

from __future__ import annotations

import ctypes
from itertools import product

import pytest
import torch

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="the CUDA emulator needs g++")
SCHEDULES = list(product((0, 1), (0, 1)))


@pytest.fixture(scope="module")
def cases() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library("cases", ["tests/cuda_emulator/cases.cu"])))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_fragments_of_every_product(cases: ctypes.CDLL) -> None:
    c = torch.full((16, 8), torch.nan)
    a, b = random(16, 16, dtype=torch.bfloat16), random(8, 16, dtype=torch.bfloat16, seed=1)
    cases.case_product_16bit(pointer(a), pointer(b), pointer(c))
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-6, atol=1e-5)
    h, k = random(16, 16, dtype=torch.float16), random(16, 8, dtype=torch.float16, seed=1)
    cases.case_product_transposed(pointer(h), pointer(k), pointer(c))
    torch.testing.assert_close(c, h.float() @ k.float(), rtol=1e-6, atol=1e-5)
    x, y = random(16, 8), random(8, 8, seed=1)
    cases.case_product_tf32(pointer(x), pointer(y), pointer(c))
    error = (c - x @ y.T).abs().max()
    assert 1e-6 < error < 1e-2, "TF32 keeps ten bits of a fraction"


def test_half_precision_rounds_as_torch_does(cases: ctypes.CDLL) -> None:
    v = torch.cat([random(1000), random(500) * 1e-7, random(500) * 1e5, torch.tensor([0.0, -0.0, 2.0**-24, 65519.9])])
    out, bits = torch.empty_like(v), torch.empty(len(v), dtype=torch.int16)
    cases.case_halves(pointer(v), pointer(out), pointer(bits), len(v))
    assert torch.equal(bits, v.half().view(torch.int16))
    assert torch.equal(out, v.half().float())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles_and_grid_barriers(cases: ctypes.CDLL, schedule: tuple[int, int]) -> None:
    cases.emulator_schedule(*schedule)
    v, out = random(64), torch.empty(64)
    cases.case_warp_sums(pointer(v), pointer(out))
    expected = v.view(2, 32).sum(1, keepdim=True) + v.view(2, 32)[:, 3:4]
    torch.testing.assert_close(out.view(2, 32), expected.expand(2, 32))
    cell, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    cases.case_global_sum(pointer(cell), pointer(seen), 5)
    assert seen.tolist() == [5] * 5


def test_a_missing_barrier_or_wait_shows(cases: ctypes.CDLL) -> None:
    v = random(128)
    for barrier, wait in product((0, 1), (0, 1)):
        right = []
        for schedule in SCHEDULES:
            cases.emulator_schedule(*schedule)
            out = torch.full((128,), torch.nan)
            assert cases.case_reverse(pointer(v), pointer(out), barrier, wait) == 0
            right.append(torch.equal(out, v.flip(0)))
        assert all(right) == bool(barrier and wait)


def test_waiting_that_cannot_end_is_an_error(cases: ctypes.CDLL) -> None:
    assert cases.case_unmatched_barrier() == 1
    assert cases.case_diverged_warp(pointer(torch.empty(1))) == 1
