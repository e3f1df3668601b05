"""The steps of `python -m bench.gpu`, each a subprocess with a time limit, each returning what it found.

A failure is a result: it is written down, and the steps behind it run all the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from models.provenance import describe

ROOT = Path(__file__).resolve().parents[2]
RIVALS = ("liger-kernel", "cut-cross-entropy", "siglip-kernel", "inf-cl", "triton")
# Compiled kernels on the device, with the cases that the interpreter runs elsewhere.
_OPS = ("dot_critic", "mlp_critic", "club", "rbf", "cross_attention")
KERNEL_CASES = tuple(f"tests.ops.{op}.triton_cases" for op in _OPS)
KERNEL_CASES += ("tests.ops.dot_critic.triton_loss_cases",)
Result = dict[str, Any]


def command(
    arguments: list[str], seconds: float, on_line: Callable[[str], None] | None = None, **environment: str
) -> Result:
    """Runs it in the checkout; stops it and its children when the time is up. `on_line` gets each line as it comes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(1.0, seconds), stop)
    timer.start()
    lines = []
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.append(line)
            if on_line is not None:
                on_line(line)
    process.wait()
    timer.cancel()
    return {
        "command": " ".join(arguments[1:] if arguments[0] == sys.executable else arguments),
        "rc": process.returncode,
        "timed_out": stopped.is_set(),
        "seconds": round(time.perf_counter() - start, 1),
        "output": "".join(lines),
    }


def brief(result: Result, characters: int = 3000) -> Result:
    """With the end of the output alone."""
    return {**result, "output": result["output"][-characters:]}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> Result:
    found: Result = {**describe(), "packages": {name: _version(name) for name in RIVALS}, "cuda": torch.version.cuda}
    if device.type == "cuda" and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(device)
        found["device"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        }
    else:
        found["device"] = {"name": "cpu"}
    return found


def build(device: torch.device, seconds: float) -> Result:
    """The compiled extension, in place: with CUDA where a toolkit and a CUDA build of torch are, else C++ alone.
    `error` says that it is not there: setup.py leaves a working pure-Python package behind a failed build."""
    if device.type != "cuda":
        return {"skipped": "no GPU is asked for: the extension stays as it is"}
    from torch.utils.cpp_extension import CUDA_HOME

    kind = "cuda" if CUDA_HOME is not None and torch.version.cuda is not None else "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}.{minor}a" if (major, minor) == (9, 0) else f"{major}.{minor}"
    found = command(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        seconds,
        MI_KERNELS_BUILD=kind,
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", arch),
    )
    check = "import sys, mi_kernels as mk; s = mk.backends()[sys.argv[1]]; print(s); sys.exit(s != 'available')"
    status = command([sys.executable, "-c", check, kind], 60.0)
    result = {"kind": kind, "arch": arch, **brief(found)}
    if found["rc"] or found["timed_out"] or status["rc"]:
        result["error"] = f"the {kind} extension is not there: {status['output'].strip()[-300:] or 'the build failed'}"
    elif kind == "cpu":
        result["note"] = "no CUDA toolkit, or a torch without CUDA: the CUDA C++ kernels are left out"
    return result


def _counts(output: str) -> dict[str, int]:
    """What pytest's last line says, or what verbose lines add up to where it was stopped before that."""
    last = re.findall(r"(\d+) (passed|failed|skipped|error)", output.rsplit("\n=", 1)[-1])
    if last:
        return {kind: int(n) for n, kind in last}
    words = {"passed": "PASSED", "failed": "FAILED", "skipped": "SKIPPED", "error": "ERROR"}
    return {kind: len(re.findall(rf"\b{word}\b", output)) for kind, word in words.items()}


def tests(
    device: torch.device, seconds: float, quick: bool, save: Callable[[Result], None] = lambda found: None
) -> Result:
    """tests/gpu on the device, and the kernel cases compiled for it, side by side; saved as each ends."""
    if find_spec("pytest") is None:
        return {"error": "pytest is not installed: pip install pytest"}
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/gpu").glob("test_*.py"))
    jobs = [(f, [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f]) for f in files]
    if device.type == "cuda":
        jobs += [(module, [sys.executable, "-m", module]) for module in KERNEL_CASES]
    elif quick:
        jobs = [(f, [*a, "-k", "quick"]) for f, a in jobs]
    where = {"MI_KERNELS_TEST_DEVICE": str(device), "TRITON_INTERPRET": "0"}
    end, found, lock = time.perf_counter() + seconds, Result(), threading.Lock()

    def run(job: tuple[str, list[str]]) -> None:
        name, arguments = job
        result = command(arguments, end - time.perf_counter(), **where)
        failures = [line for line in result["output"].splitlines() if re.search(r"FAILED|ERROR|error |differ", line)]
        row = {
            "rc": result["rc"],
            "timed_out": result["timed_out"],
            "seconds": result["seconds"],
            **({"counts": _counts(result["output"])} if name.endswith(".py") else {}),
            "failures": failures[:50],
            "tail": result["output"][-600:],
        }
        with lock:
            found[name] = row
            save(found)

    with ThreadPoolExecutor(max(1, min(len(jobs), (os.cpu_count() or 2) // 2))) as pool:
        list(pool.map(run, jobs))
    return {name: found[name] for name, _ in jobs}


def _sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin/compute-sanitizer") for home in homes if home]
    return shutil.which("compute-sanitizer") or next((c for c in candidates if os.access(c, os.X_OK)), None)


def sanitize(device: torch.device, seconds: float) -> Result:
    """memcheck and racecheck over one small problem of every operator on every backend of the device."""
    if device.type != "cuda":
        return {"skipped": "no GPU is asked for"}
    tool = _sanitizer()
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed (it comes with the CUDA toolkit)"}
    small = [sys.executable, "-m", "bench.gpu.small", "--device", str(device)]
    found: Result = {}
    for kind in ("memcheck", "racecheck"):
        result = command([tool, "--tool", kind, "--error-exitcode", "9", *small], seconds / 2)
        summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", result["output"])
        found[kind] = {"clean": result["rc"] == 0, "summary": summaries, **brief(result)}
    return found


class _Collected:
    """What the lines of `bench.gpu.run` say, handed to `save` after every row: a run that is cut says what it has."""

    def __init__(self, save: Callable[[Result], None]):
        self.found: Result = {"cases": [], "crashed": []}
        self.save, self.done, self.started = save, 0, None
        self.part: Result | None = None  # the rows of a case that has not ended

    def line(self, text: str) -> None:
        try:
            line = json.loads(text) if text.startswith("{") else {}
        except json.JSONDecodeError:
            return  # cut off where the process was stopped
        if "ceilings" in line:
            self.found.setdefault("ceilings", line["ceilings"])
        self.started = line.get("started", self.started)
        if "part" in line:
            self.part = line["part"]
            self.save({**self.found, "cases": [*self.found["cases"], self.part]})
        if "case" in line:
            self.found["cases"].append(line["case"])
            self.done, self.started, self.part = self.done + 1, None, None
            self.save(self.found)

    def cut(self) -> None:
        """The process ended within a case: its rows so far stay."""
        if self.part is not None:
            self.found["cases"].append({**self.part, "error": "the process ended after these rows"})
        self.part = None


def bench(
    device: torch.device, seconds: float, quick: bool, cases: int, save: Callable[[Result], None] = lambda found: None
) -> Result:
    """All cases; where one takes its process down, the rest run in a new one."""
    collected = _Collected(save)
    end = time.perf_counter() + seconds
    while collected.done < cases and time.perf_counter() < end - 2:
        arguments = [sys.executable, "-m", "bench.gpu.run", "--device", str(device), "--skip", str(collected.done)]
        collected.started = None
        result = command([*arguments, *(["--quick"] if quick else [])], end - time.perf_counter(), collected.line)
        if result["rc"] != 0 or collected.started is not None:
            collected.found["crashed"].append({"case": collected.started, **brief(result, 1500)})
            collected.cut()
            collected.done += 1
        if result["timed_out"]:
            break
    collected.found["left_out"] = max(0, cases - collected.done)
    return collected.found
