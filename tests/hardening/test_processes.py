"""Python threads, OpenMP threads, forked workers, and memory over many steps."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.hardening import loads, memory

ROOT = Path(__file__).resolve().parents[2]


def _equal(found: dict[str, list[Tensor]], want: dict[str, list[Tensor]]) -> None:
    different = [n for n in want if not all(map(torch.equal, found[n], want[n]))]
    assert not different


def test_two_python_threads_compute_what_one_does() -> None:
    every = [loads.steps(seed) for seed in range(2)]
    want = [{name: step() for name, step in steps.items()} for steps in every]
    failed: list[BaseException] = []

    def run(k: int) -> None:
        try:
            for _ in range(15):
                _equal({name: step() for name, step in every[k].items()}, want[k])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed, failed[0]


class _Steps(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> dict[str, list[Tensor]]:
        return {name: step() for name, step in loads.steps(k).items()}


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_compute_what_the_parent_does(one_thread: None) -> None:
    """Workers are forked after the parent has used the operators: they inherit its buffers, but not its threads."""
    want = [_Steps()[k] for k in range(4)]
    loader = DataLoader(_Steps(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=100)
    for found, expected in zip(loader, want, strict=True):
        _equal(found, expected)


SUMS = """
import torch
from tests.hardening import loads
print(torch.get_num_threads())
for name, step in loads.steps().items():
    print(name.replace(" ", "_"), *(f"{t.double().norm().item():.17g}" for t in step()))
"""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    """Equal up to rounding, because the order of sums over panels may differ; also with more threads than cores."""
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append({name: step() for name, step in loads.steps().items()})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("count", ["1", "3"])
def test_the_environment_sets_the_threads(count: str) -> None:
    code = SUMS.replace("print(torch", f"torch.set_num_threads({count}); print(torch")
    environment = {**os.environ, "OMP_NUM_THREADS": count}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == count
    for row, step in zip(rows, loads.steps().values(), strict=True):
        norms = torch.tensor([t.double().norm().item() for t in step()])
        torch.testing.assert_close(torch.tensor([float(v) for v in row.split()[1:]]), norms, rtol=2e-5, atol=2e-6)


def test_memory_is_flat(one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A leak of one gradient (2.6 KB) per operator and step would add 3.6 MiB. For longer runs there is memory.py."""
    memory.profile(20, points=1)
    found = memory.profile(200, points=2)
    assert found[1] - found[0] < 2.0


def test_the_training_steps_learn(one_thread: None) -> None:
    """The steps that `memory --training` runs are real training: the losses decrease."""
    for name, step in loads.training().items():
        values = [float(step()) for _ in range(60)]
        assert sum(values[-10:]) < sum(values[:10]), name
