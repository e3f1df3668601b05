"""Compiles CUDA sources for the emulator with g++; built libraries are kept in build/ under a hash of their input."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Variables that a kernel forgets to set hold a pattern, and products are not contracted behind its back.
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-Wno-attributes"]
EMULATED = ["-DMI_CUDA_EMULATOR=1", "-I" + str(ROOT / "tests/cuda_emulator"), "-I" + str(ROOT / "csrc")]


def compiler() -> str | None:
    found = os.environ.get("CXX") or shutil.which("g++")
    return found if found and "g++" in found else None


def library(name: str, sources: list[str], extra: list[str] | None = None, optimize: str = "-O1") -> Path:
    """The shared library of `sources` (paths from the repository's root), built when it is out of date."""
    flags = [*FLAGS, *EMULATED, *(extra or [])]
    digest = hashlib.sha256(" ".join([*flags, optimize, *sources]).encode())
    for path in sorted([*ROOT.glob("csrc/**/*"), *ROOT.glob("tests/cuda_emulator/*")]):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            digest.update(path.read_bytes())
    out = ROOT / "build" / "cuda_emulator" / f"{name}-{digest.hexdigest()[:16]}.so"
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f"{name}-*"):
        stale.unlink()
    work = out.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler() or "g++", optimize, *flags, "-shared", "-x", "c++", *sources, "-x", "none", "-o", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
    work.rename(out)
    return out
