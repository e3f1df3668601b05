"""Helpers for tests of torch operators on the emulator: loading them, and inputs surrounded by NaNs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.cuda_emulator import build


class Emulated:
    """Loads the operators of csrc/<op>/; `schedule` sets the order of threads and when asynchronous copies land."""

    def __init__(self, op: str) -> None:
        path = build.operators(op)
        torch.ops.load_library(path)
        self.schedule = ctypes.CDLL(str(path)).emulator_schedule


def poisoned(op: str) -> Iterator[Emulated]:
    """For a fixture: yields the operators while torch fills uninitialised memory with NaN (deterministic mode)."""
    kernels = Emulated(op)
    torch.use_deterministic_algorithms(True)
    yield kernels
    torch.use_deterministic_algorithms(False)


def surrounded(t: Tensor) -> Tensor:
    """A copy of t inside a larger buffer of NaNs (integers: of ones), still aligned to 16 bytes."""
    pad = 64
    whole = torch.full((t.numel() + 2 * pad,), math.nan if t.is_floating_point() else 1, dtype=t.dtype)
    whole[pad : pad + t.numel()] = t.reshape(-1)
    return whole[pad : pad + t.numel()].view(t.shape)
