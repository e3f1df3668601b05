"""Sdist and wheel, installed into an environment that has only torch and its dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mi_kernels.backends import extension_status
from tools import wheel

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import importlib.util, pathlib, sys
import torch
import torch.nn.functional as F
import mi_kernels as mk

assert pathlib.Path(mk.__file__).is_relative_to(sys.prefix), mk.__file__
there = [name for name in ("numpy", "lightning", "sklearn", "scipy", "triton", "models", "bench")
         if importlib.util.find_spec(name)]
assert not there, there
x, y = torch.randn(33, 7, requires_grad=True), torch.randn(33, 7)
loss = mk.info_nce(x, y, temperature=0.2)
scores = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / 0.2
expected = F.cross_entropy(scores, torch.arange(33))
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)))
assert mk.CLUB(7, 7, 8)(x, y).isfinite()
assert mk.InfoNCE(mk.ConcatCritic(7, 7, (8, 8)))(x, y).isfinite()
assert mk.lstm(torch.randn(2, 3, 4), torch.randn(20, 4), torch.randn(20, 5))[0].isfinite().all()
found = mk.estimate_mi(torch.randn(60, 2), torch.randn(60, 2), max_steps=2, progress=False)
assert abs(found.value) < 2
print(mk.backends()["cpu"])
"""


def _with_needs(name: str, seen: set[str]) -> Iterator[metadata.Distribution]:
    """An installed distribution and, recursively, all that it requires on this platform."""
    if name in seen:
        return
    seen.add(name)
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # for another platform, although its markers apply here
        return
    yield found
    for text in found.requires or []:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield from _with_needs(need.name, seen)


def environment(folder: Path) -> Path:
    """The Python of a new environment that links to this one's torch, because a copy would take a minute."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for found in _with_needs("torch", set()):
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (packages / top).exists() and top != "__pycache__":
                (packages / top).symlink_to(source)
    return folder / "bin" / "python"


def installed_and_used(package: Path, folder: Path) -> tuple[Path, str]:
    """Installs a package with pip, without an index, and runs the smoke test in another folder. Returns the
    environment's Python and the output."""
    python = environment(folder)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-cache-dir", package]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    done = subprocess.run([python, "-I", "-c", SMOKE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python, done.stdout.strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build_sdist(tmp_path_factory.mktemp("sdist"))


def test_the_sdist_holds_what_the_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mi_kernels").rglob("*.py")}
    data = {"mi_kernels/py.typed", "mi_kernels/ops/dot_critic/routes.json"}
    assert sources | modules | data | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not {name for name in held if name.startswith(("models", "bench", "tests", "tools"))}
    assert not {name for name in held if name.endswith(".so")}


def test_an_sdist_without_a_compiler_runs_with_torch_alone(sdist: Path, tmp_path: Path) -> None:
    package = wheel.build_wheel(sdist, tmp_path / "dist", "python")
    assert package.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(package) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "\nRequires-Dist: torch>=2.6\n" in archive.read(name).decode()
    _, said = installed_and_used(package, tmp_path / "environment")
    assert "was not built" in said


@pytest.mark.skipif(extension_status() != "available", reason="the extension is not built")
def test_the_wheel_names_torch_and_the_platform_and_runs_with_torch_alone(sdist: Path, tmp_path: Path) -> None:
    package = wheel.build_wheel(sdist, tmp_path / "dist", "built")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert re.fullmatch(rf"mi_kernels-[\w.]+\+torch{minor}\.\w+-py3-none-(many)?linux\w+\.whl", package.name)
    python, said = installed_and_used(package, tmp_path / "environment")
    assert said == "available"
    code = "from importlib.metadata import requires, version; print(version('mi-kernels'), requires('mi-kernels')[0])"
    told = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"+torch{minor}." in told[0] and told[1] == f"torch=={minor}.*"
    subprocess.run([python, "-m", "mi_kernels", "bounds"], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("libc", "stdcxx", "needs", "tag"),
    [
        ("2.17", "3.4.19", "libtorch_cpu.so", "manylinux_2_17"),
        ("2.34", "3.4.21", "libgomp.so.1", "manylinux_2_34"),
        ("2.17", "3.4.30", "libc.so.6", "manylinux_2_35"),  # this libstdc++ needs a newer libc than 2.17
        ("2.36", "3.4.30", "libm.so.6", "manylinux_2_36"),
        ("2.17", "3.4.19", "libopenblas.so.0", "linux"),
        ("2.17", "3.4.99", "libc.so.6", "linux"),
    ],
)
def test_platform_tag(libc: str, stdcxx: str, needs: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = f"Name: GLIBC_2.2.5\nName: GLIBC_{libc}\nName: GLIBCXX_3.4.9\nName: GLIBCXX_{stdcxx}\nName: CXXABI_1.3\n"
    table = f" 0x0001 (NEEDED)  Shared library: [{needs}]\n"
    monkeypatch.setattr(wheel, "run", lambda *command: table if "-dW" in command else symbols)
    assert wheel.platform_tag(Path("_C.so")).startswith(tag + "_x86_64" if tag != "linux" else "linux_")


def test_metadata_that_does_not_require_torch_is_refused() -> None:
    with pytest.raises(ValueError, match="require torch once, got 0"):
        wheel.labelled_metadata("Metadata-Version: 2.4\nName: a\nVersion: 1\n", "2.13", "torch2.13.cpu")
