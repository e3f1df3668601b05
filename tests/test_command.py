"""`python -m mi_kernels estimate`: results, and errors that end in exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mi_kernels as mk
from mi_kernels.__main__ import main

np = pytest.importorskip("numpy")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--max-steps", "50", "--quiet"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    x, y = mk.tasks.gaussian(1.0, 2).sample(400, 3)
    path = tmp_path / "pair.npz"
    np.savez(path, x=x.numpy(), y=y.numpy(), other=y.numpy()[:, 0], names=np.array([{"a": 1}], dtype=object))
    return path


def test_prints_and_writes_what_estimate_mi_returns(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.with_suffix(".json")
    assert main(["estimate", str(file), "--y", "other", "--json", str(out), *QUICK]) == 0
    content = np.load(file)
    expected = mk.estimate_mi(content["x"], content["other"], max_steps=50, progress=False)
    assert json.loads(out.read_text()) | {"seconds": 0} == expected.as_dict() | {"seconds": 0}
    assert f"{expected.value:.4f} ± " in capsys.readouterr().out


def test_draws(file: Path) -> None:
    pytest.importorskip("matplotlib")
    out = file.with_suffix(".png")
    assert main(["estimate", str(file), "--plot", str(out), *QUICK]) == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("arguments, message", [
    (["--x", "absent"], "no array 'absent', only x, y, other, names: name one with --x"),
    (["--x", "names"], "'names'"),
    (["--max-steps", "0"], "max_steps must"),
    (["--json", "/nonexistent/out.json"], "/nonexistent/out.json"),
])
def test_bad_input_exits_with_2(
    file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(file), *QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_broken_files_exit_with_2(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    assert main(["estimate", str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_single_arrays_and_absent_files_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "one.npy", torch.zeros(3).numpy())
    assert main(["estimate", str(tmp_path / "one.npy")]) == 2
    assert main(["estimate", str(tmp_path / "absent.npz")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_unknown_names_exit_with_2_from_a_shell(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mi_kernels", "estimate", str(file), "--estimator", "best"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2 and "--estimator" in done.stderr
