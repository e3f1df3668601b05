"""torch.compile in torch versions that cannot trace this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mi_kernels.ops.common.compiler import traceable


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("2.6.0+cu124", False),
        ("2.8.0", False),
        ("2.10.0", False),
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("3.0.0a0", True),
        ("dev", True),
    ],
)
def test_old_versions_are_known(version: str, wanted: bool) -> None:
    assert traceable(version) == wanted


def test_this_version_is_traced() -> None:
    assert traceable(torch.__version__)


PROGRAM = """
import torch
import mi_kernels as mk
from mi_kernels.ops.common.compiler import keep_out_of_compiled_graphs

keep_out_of_compiled_graphs()
layer = torch.nn.Linear(4, 4)
step = lambda x, y: mk.info_nce(layer(x), y) * 2
x, y = torch.randn(6, 4), torch.randn(6, 4)
compiled = torch.compile(step, backend="eager")
torch.testing.assert_close(compiled(x, y), step(x, y))
compiled(x, y).backward()
found, layer.weight.grad = layer.weight.grad, None
step(x, y).backward()
torch.testing.assert_close(found, layer.weight.grad)
assert torch._dynamo.explain(step)(x, y).graph_break_count > 0
"""


def test_an_old_compiler_runs_the_package_outside_its_graphs() -> None:
    """Runs in its own process, because keep_out_of_compiled_graphs cannot be undone."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
