"""`python -m mi_kernels estimate`: results, and errors with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    (["--x", "names"], "holds Python objects"),
    (["--max-steps", "0"], "max_steps must"),
])
def test_bad_input_exits_with_2(
    file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(file), *QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("arguments, message", [
    (["--json", "/nonexistent/out.json"], "/nonexistent/out.json cannot be written: there is no folder /nonexistent"),
    (["--plot", "/nonexistent/out.png"], "there is no folder /nonexistent"),
    (["--json", "."], ". cannot be written: it is a folder"),
    (["--plot", "out.xls"], "--plot must end in one of ."),
])
def test_outputs_that_cannot_be_written_are_refused_before_the_estimate(
    file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("mi_kernels.__main__.estimate_mi", lambda *_, **__: pytest.fail("the estimate was begun"))
    assert main(["estimate", str(file), *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_and_no_percent_signs_of_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "%%" not in said and "95 % interval" in said and "training steps at most (default: 1500)" in said


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"),
    (b"<!doctype html><html></html>", "is not a .npz file"),
    (b"\x80\x04N.", "is not a .npz file"),
    (b"PK\x03\x04 cut short", "is a damaged .npz file"),
    (b"\x93NUMPY\x01\x00", "holds one array"),
    (None, "does not exist"),
    ("a directory", "is a directory"),
])
def test_files_that_are_no_npz_exit_with_2_and_one_sentence(
    tmp_path: Path, content: bytes | str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    assert main(["estimate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} {message}") and error.count("\n") == 1 and "pickle" not in error


def test_unknown_names_exit_with_2_from_a_shell(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mi_kernels", "estimate", str(file), "--estimator", "best"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2 and "--estimator" in done.stderr
