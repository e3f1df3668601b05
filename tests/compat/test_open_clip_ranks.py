"""open_clip's exchanges between neighbouring ranks, in rings of three and of two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import mi_kernels as mk

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)


def test_features_go_to_neighbours_and_gradients_come_back(tmp_path):
    world = 3
    command = [sys.executable, "-m", "tests.compat.neighbours_worker"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store")],
            cwd=Path(mk.__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * world, "\n".join(said)
