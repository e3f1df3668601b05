"""The distributed tests of pytorch-metric-learning on CPU processes, with the losses and wrappers of this package:

    git clone https://github.com/KevinMusgrave/pytorch-metric-learning /tmp/pml
    python -m tools.original_ranks --checkout /tmp/pml

Those tests train a small network under DistributedDataParallel, with and without miners, references and
CrossBatchMemory, and compare its weights with training in one process. They skip CPUs. Their file is not changed:
every rank is a process that runs all tests over gloo, and takes its own part where the tests would start processes.
`--loss original` keeps the original's losses and wrappers, for comparison.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ("ContrastiveLoss", "NTXentLoss", "SupConLoss", "original")
WORLD = 2


def _ours(module: Any, loss: str) -> None:
    """The names that the tests import from the original, replaced by those of this package where it has them."""
    from mi_kernels.compat.pytorch_metric_learning import losses
    from mi_kernels.compat.pytorch_metric_learning.utils import distributed

    module.distributed, module.CrossBatchMemory = distributed, losses.CrossBatchMemory
    if loss != "ContrastiveLoss":  # this package has none: the original's, in our wrappers
        module.ContrastiveLoss = getattr(losses, loss)


def _on_cpus(module: Any, rank: int, port: int) -> None:
    """Lets the tests believe in WORLD devices, and runs the part of this rank on a CPU."""
    import torch

    start, started = torch.distributed.init_process_group, 0

    def initialise(backend: str, rank: int, world_size: int) -> None:
        nonlocal started
        started += 1  # a port for every group: the last one's may still be closing
        os.environ["MASTER_PORT"] = str(port + started + (1000 + 1000 * own if world_size == 1 else 0))
        start("gloo", rank=rank, world_size=world_size)

    def spawn(function: Any, args: tuple[Any, ...], nprocs: int, join: bool) -> None:
        assert nprocs == WORLD and join
        module.TEST_DEVICE = torch.device("cpu")
        function(own, *(copy.deepcopy(a) if isinstance(a, torch.nn.Module) else a for a in args))
        module.TEST_DEVICE = "cpu"

    own = rank
    torch.distributed.init_process_group = initialise
    torch.cuda.device_count = lambda: WORLD
    module.mp = SimpleNamespace(spawn=spawn)
    module.TEST_DEVICE = "cpu"  # is no torch.device("cpu"), which the tests skip


def run_rank(rank: int, loss: str, port: int) -> int:
    os.environ |= {"TEST_DEVICE": "cpu", "TEST_DTYPES": "float32"}
    sys.path[:0] = [os.getcwd(), str(ROOT)]
    from importlib import import_module

    module = import_module("tests.utils.test_distributed")
    if loss != "original":
        _ours(module, loss)
    _on_cpus(module, rank, port)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    return not unittest.TextTestRunner(verbosity=2 if rank == 0 else 0).run(suite).wasSuccessful()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a clone of pytorch-metric-learning")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES[:3]))
    parser.add_argument("--port", type=int, default=27000, help="the first port; the 3,000 after it must be free too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options.rank, options.loss[0], options.port)
    failed = 0
    for k, loss in enumerate(options.loss):
        print(f"{loss}:", flush=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--checkout", ".", "--loss", loss]
        command += ["--port", str(options.port + 100 * k)]
        ranks = [subprocess.Popen([*command, "--rank", str(r)], cwd=options.checkout) for r in range(WORLD)]
        failed += any([process.wait() for process in ranks])
    return failed


if __name__ == "__main__":
    sys.exit(main())
