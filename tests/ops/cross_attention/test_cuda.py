"""Attention's CUDA kernels, run on the CPU by the emulator, against the materialised definition in fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from mi_kernels.ops.cross_attention import cuda
from tests.cuda_emulator import build
from tests.cuda_emulator.operators import poisoned
from tests.ops.cross_attention.cases import Case, Pair, failures, hidden_nans, inputs, measured

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="the CUDA emulator needs g++")
BOTH = (False, True)
MULT = (
    Pair(B=2, Tq=50, Tk=75, E=5, EV=5, offset=25, lengths="k"),
    Pair(B=2, Tq=75, Tk=50, E=5, EV=5, lengths="qk", dropout=0.4, scale=1.3),
    Pair(B=3, heads=1, Tq=5, Tk=130, E=5, EV=5, offset=-2, lengths="q"),
    Pair(heads=1, Tq=70, Tk=33, E=4, EV=5, merged=True),
)
CASES = (
    [Case(pairs=(Pair(B=3, lengths="qk", offset=c),), sparse=s) for s in BOTH for c in (-7, 0)]
    + [Case(pairs=(Pair(Tq=131, Tk=45, E=E, EV=EV, dropout=p, offset=9, merged=True),), sparse=s)
       for s in BOTH for E, EV, p in ((4, 4, 0.0), (8, 7, 0.5), (10, 12, 0.1), (16, 3, 0.3), (13, 16, 0.0))]
    + [Case(pairs=MULT, sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(Tq=1, Tk=1, E=1, EV=1), Pair(Tq=1, E=1, EV=1), Pair(Tk=1, E=1, EV=1)), sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(),) * 18, sparse=s) for s in BOTH]
    + [Case(pairs=(Pair(Tq=40),), sparse=s, dtype=t) for s in BOTH for t in (torch.bfloat16, torch.float16)]
    + [Case(pairs=(Pair(heads=1, Tk=300),), sparse=s, spread=d) for s in BOTH for d in (0.01, 30.0)]
    # Scores so large that tau is lost in their rounding.
    + [Case(pairs=(Pair(heads=1, Tk=300),), sparse=True, spread=d) for d in (1e9, 1e30)]
)  # fmt: skip


@pytest.fixture(scope="module")
def schedule() -> Iterator[ctypes._CFuncPtr]:
    """Loads the emulated operators; returns the function that sets the order of threads and of asynchronous copies."""
    for kernels in poisoned("cross_attention"):
        yield kernels.schedule


@pytest.mark.parametrize("n", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n].dtype}-{len(CASES[n].pairs)}")
def test_outputs_and_gradients_match_the_fp64_definition(schedule, n: int) -> None:
    schedule(0, 0)
    assert failures(CASES[n], n, cuda.forward, cuda.backward) == []


@pytest.mark.parametrize("sparse", BOTH)
def test_a_nan_shows_in_the_rows_that_see_it(schedule, sparse: bool) -> None:
    schedule(0, 0)
    assert hidden_nans(sparse, cuda.forward) == []


@pytest.mark.parametrize("n", range(0, len(CASES), 5))
def test_no_order_of_threads_changes_a_bit(schedule, n: int) -> None:
    sides, seeds = inputs(CASES[n], n)
    runs = []
    for order in ((0, 0), (1, 0), (0, 1), (1, 1)):
        schedule(*order)
        runs.append(measured(CASES[n], sides, seeds, cuda.forward, cuda.backward))
    schedule(0, 0)
    for run in runs[1:]:
        for pair, first in zip(run, runs[0], strict=True):
            assert all(torch.equal(pair[name], first[name]) for name in first)


def test_what_has_no_kernel_is_an_error() -> None:
    lengths = torch.empty(0, dtype=torch.int64)
    for t in (torch.zeros(1, 1, 3, 17), torch.zeros(1, 1, 3, 4, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="heads of up to 16"):
            cuda.forward([t], [t], [t], [lengths], [lengths], [0], [1.0], [0.0], torch.zeros(1).long(), False)
