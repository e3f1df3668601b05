"""`import mi_kernels` needs only torch; each test starts a new process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mi_kernels"

BLOCK = """
import sys

BLOCKED = {"triton", "numpy", "scipy", "lightning", "pytorch_lightning", "sklearn", "torchmetrics", "pandas",
           "matplotlib", "tensorboard"}

class Without:
    # A finder that does not find the blocked packages: they look absent, as where they were never installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

LOSS_EQUALS_CROSS_ENTROPY = """
import torch
import torch.nn.functional as F
import mi_kernels

x, y = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
loss = mi_kernels.info_nce(x, y, temperature=0.2)
(gradient,) = torch.autograd.grad(loss, x)
expected = F.cross_entropy(F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / 0.2, torch.arange(7))
(expected_gradient,) = torch.autograd.grad(expected, x)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(gradient, expected_gradient)
"""


def run_fresh(code: str, **environment: str) -> str:
    ours = ("MI_KERNELS_", "TRITON_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_loss_need_torch_alone() -> None:
    status = run_fresh(
        BLOCK + LOSS_EQUALS_CROSS_ENTROPY + "print(mi_kernels.backends()['cpu'])",
        MI_KERNELS_DISABLE_EXTENSION="1",
    )
    assert "MI_KERNELS_DISABLE_EXTENSION" in status


def test_loss_equals_cross_entropy_on_the_default_backend() -> None:
    run_fresh(LOSS_EQUALS_CROSS_ENTROPY)


@pytest.mark.parametrize("library", ["triton", "lightning", "sklearn", "matplotlib", "models", "bench"])
def test_import_does_not_bring_in(library: str) -> None:
    assert run_fresh(f"import torch, mi_kernels, sys; print({library!r} in sys.modules)").strip() == "False"


def test_missing_extension_warns_once() -> None:
    code = """
import warnings, torch, mi_kernels
x = torch.randn(4, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        mi_kernels.info_nce(x, x)
print(sum("plain torch" in str(warning.message) for warning in caught))
"""
    assert run_fresh(code, MI_KERNELS_DISABLE_EXTENSION="1").strip() == "1"


def imported_at_module_level(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_torch_and_the_standard_library(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "mi_kernels"}
    if path.name.startswith("triton"):
        allowed.add("triton")
    assert imported_at_module_level(ast.parse(path.read_text())) <= allowed
