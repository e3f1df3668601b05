"""Fixtures that every test may use."""

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
    """For many small steps: threads that wait for each other at every one of them crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For kernels that split their work: `make test` runs one process a core, each on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator of its own, for tests that draw inputs independently of the global state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """MI_KERNELS_TEST_DEVICE, or else the GPU; skips where there is none."""
    named = os.environ.get("MI_KERNELS_TEST_DEVICE")
    if not named and not torch.cuda.is_available():
        pytest.skip("no GPU is here (MI_KERNELS_TEST_DEVICE=cpu runs what a CPU can)")
    return torch.device(named or "cuda")


@pytest.fixture
def data_dir() -> Path:
    """Folder of the real data sets: MI_KERNELS_DATA, or ../shared/data beside the checkout; else skips."""
    named = os.environ.get("MI_KERNELS_DATA")
    path = Path(named) if named else ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no data folder: set MI_KERNELS_DATA to one that holds the .npz data sets")
    return path
