"""Fixtures for all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python's and torch's generators before every test."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, for tests with many small steps: on a busy machine threads that synchronise at every step are
    slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, for kernels that split their work: `make test` runs one process per core with one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """A separate CPU generator, for tests that draw inputs independently of the global state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device in MI_KERNELS_TEST_DEVICE, or else the GPU; skips the test if there is neither."""
    named = os.environ.get("MI_KERNELS_TEST_DEVICE")
    if not named and not torch.cuda.is_available():
        pytest.skip("no GPU is here (MI_KERNELS_TEST_DEVICE=cpu runs what a CPU can)")
    return torch.device(named or "cuda")


@pytest.fixture
def data_dir() -> Path:
    """Folder of the real data sets: MI_KERNELS_DATA, or ../shared/data next to the checkout; skips if there is none."""
    named = os.environ.get("MI_KERNELS_DATA")
    path = Path(named) if named else ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no data folder: set MI_KERNELS_DATA to one that holds the .npz data sets")
    return path
