"""What pip installs; and that a failed build of the extension leaves a pure-Python install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the build files around a package and a C++ source that does not compile."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("mi_kernels", "models", "csrc"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mi_kernels" / "__init__.py").write_text("")
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "csrc" / "register.cpp").write_text("#error this source is broken\n")
    return tmp_path


def build(tree: Path, command: str = "build", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", command],
        cwd=tree,
        env={**os.environ, "MI_KERNELS_BUILD": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tree.rglob("_C*.so"))
    lines = done.stderr.splitlines()
    plain = [line for line in lines if line.startswith("mi-kernels: no compiled extension")]
    assert len(plain) == 1, done.stderr
    return plain[0]


def test_torch_is_the_only_runtime_dependency(project: dict[str, Any]) -> None:
    assert project["project"]["dependencies"] == ["torch>=2.6"]


def test_build_does_not_fetch_torch(project: dict[str, Any]) -> None:
    assert not [need for need in project["build-system"]["requires"] if need.startswith("torch")]


def test_only_the_library_is_shipped(tree: Path) -> None:
    build(tree, MI_KERNELS_BUILD="python")
    shipped = {path.name for path in next((tree / "build").glob("lib*")).iterdir()}
    assert shipped == {"mi_kernels"}


def test_python_only_build_removes_a_stale_extension(tree: Path) -> None:
    (tree / "mi_kernels" / "_C.so").write_bytes(b"")
    assert "MI_KERNELS_BUILD=python" in build(tree, MI_KERNELS_BUILD="python")


def test_missing_compiler_leaves_a_pure_python_build(tree: Path) -> None:
    assert "no C++ compiler" in build(tree, CXX="no-such-compiler")


def test_missing_sources_leave_a_pure_python_build(tree: Path) -> None:
    (tree / "csrc" / "register.cpp").unlink()
    assert "no C++ source" in build(tree)


def test_an_old_setuptools_is_named(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """setup.py names the setuptools that is needed. The one in a new environment of Python 3.11 does not understand
    pyproject.toml and would fail with forty lines."""
    old = tmp_path_factory.mktemp("old")
    (old / "setuptools.py").write_text("__version__ = '65.5.0'\ndef setup(**_): pass\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("pip install --upgrade 'setuptools>=77'") and "65.5.0" in done.stderr


def test_a_built_library_is_packed_in_place_too(tree: Path) -> None:
    """With MI_KERNELS_BUILD=built, `build_ext --inplace` (which `pip install -e .` runs) keeps the existing library."""
    (tree / "mi_kernels" / "_C.so").write_bytes(b"library")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "MI_KERNELS_BUILD": "built"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tree / "mi_kernels" / "_C.so").read_bytes() == b"library"


def test_unknown_build_mode_is_refused(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=tree,
        env={**os.environ, "MI_KERNELS_BUILD": "fpga"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "MI_KERNELS_BUILD must be python, cpu, cuda or built, got 'fpga'" in done.stderr


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_broken_source_leaves_a_pure_python_build(tree: Path) -> None:
    assert "the build failed" in build(tree)
