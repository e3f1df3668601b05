"""Every script of examples/ runs with small settings and prints the results that its page claims."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
HELPERS = {"toy_pairs"}
SMALL_CLIP = ("--steps", "30", "--batch", "64")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None):
    """A function that runs one script in this process, as from the command line, and returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        return capsys.readouterr().out

    return call


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss (\d+\.\d+)", text)]


def found_texts(text: str) -> float:
    """The percentage of images that retrieve their text; by chance it would be one in 500."""
    found = re.search(r"(\d+)% of 500 unseen images", text)
    assert found, text
    return float(found[1])


def test_every_example_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - HELPERS
    tested = set(re.findall(r'(?:run\(|script = )"(\w+)"', Path(__file__).read_text()))
    assert names == tested


def test_both_losses_of_the_plain_loop_train_alike(run) -> None:
    fused, eager = run("clip_loop", *SMALL_CLIP), run("clip_loop", "--loss", "eager", *SMALL_CLIP)
    torch.testing.assert_close(losses(fused), losses(eager), rtol=0, atol=1e-3)
    assert losses(fused)[-1] < losses(fused)[0] - 1
    assert found_texts(fused) > 10


def test_the_lightning_module_trains(run) -> None:
    pytest.importorskip("lightning")
    assert found_texts(run("clip_lightning", "--epochs", 4, "--rows", 512, "--batch", 64)) > 10


def test_two_processes_train_as_the_plain_loop_does(run) -> None:
    """With the same rows and weights, two ranks have the losses of the single-process loop, as the example says."""
    script = "clip_ddp"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py"), "--schedule", "ring", *SMALL_CLIP],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(done.stdout), losses(run("clip_loop", *SMALL_CLIP)), rtol=0, atol=1e-3)


def test_estimates_come_with_intervals_and_a_plot(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "mi.png"
    text = run("estimate_mi", "--truths", 1, "--samples", 400, "--max-steps", 100, "--out", out)
    value, low, high = map(float, re.findall(r"estimate +(\S+)  95 % +(\S+) to +(\S+)", text)[0])
    assert low < 1 < high and low < value < high
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_bound_of_ones_own_estimates(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mi_kernels.bounds import registry

    # Undo the example's registration after this test.
    monkeypatch.setattr(registry, "_declared", dict(registry._declared))
    text = run("own_bound", "--samples", 400, "--max-steps", 100)
    found = dict(re.findall(r"(\w+) +truth 1.00  (\S+) ±", text))
    assert set(found) == {"remine", "dv", "infonce"}
    assert abs(float(found["remine"]) - 1) < 0.35


def test_factorcl_trains_on_arrays_of_ones_own(run, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    text = run("factorcl_own_data", "--out", tmp_path / "own", "--rows", 400, "--epochs", 2)
    assert (tmp_path / "own" / "fit" / "weights.safetensors").is_file()
    found = dict(re.findall(r"^[* ] (\S+ +\S.*?)  +(\d\.\d{3})\b", text, flags=re.M))
    found = {" ".join(name.split()): float(value) for name, value in found.items()}
    # The labels are signs of products, which a linear model of the inputs cannot represent.
    assert found["factorcl-sup full"] > found["linear input"] + 0.2, text
