"""Compiles CUDA sources for the emulator with g++. Libraries are cached in build/ under a hash of their inputs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Uninitialised variables are filled with a pattern, and the compiler does not contract products to multiply-adds.
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-Wno-attributes"]
EMULATED = ["-DMI_CUDA_EMULATOR=1", "-I" + str(ROOT / "tests/cuda_emulator"), "-I" + str(ROOT / "csrc")]


def compiler() -> str | None:
    found = os.environ.get("CXX") or shutil.which("g++")
    return found if found and "g++" in found else None


def library(name: str, sources: list[str], extra: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """The shared library of `sources` (paths from the repository's root), built if it is out of date."""
    flags = ["-O1", *FLAGS, *EMULATED, *extra]
    digest = hashlib.sha256(" ".join([*flags, *sources, *link]).encode())
    for path in sorted([*ROOT.glob("csrc/**/*"), *ROOT.glob("tests/cuda_emulator/*")]):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            digest.update(path.read_bytes())
    out = ROOT / "build" / "cuda_emulator" / f"{name}-{digest.hexdigest()[:16]}.so"
    out.parent.mkdir(parents=True, exist_ok=True)
    # Tests run in several processes: one builds, the others wait for it.
    with out.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            build(out, name, flags, sources, link)
    return out


def build(out: Path, name: str, flags: list[str], sources: list[str], link: Sequence[str]) -> None:
    for stale in out.parent.glob(f"{name}-*.so"):
        stale.unlink()
    work = out.with_suffix(f".{os.getpid()}.tmp")
    command = [
        compiler() or "g++",
        *flags,
        "-shared",
        "-x",
        "c++",
        *sources,
        "tests/cuda_emulator/schedule.cu",
        "-x",
        "none",
        "-o",
        str(work),
        *link,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
    work.rename(out)


def operators(*ops: str) -> Path:
    """The torch operators of csrc/<op>/ on the emulator, to be loaded with torch.ops.load_library."""
    import torch

    torch_root = Path(torch.__file__).parent
    include = torch_root / "include"
    extra = [
        "-DMI_KERNELS_WITH_CUDA=1",
        "-DMK_ROW_BLOCKS=2",  # so that small problems take the code path of large ones
        f"-I{include}",
        f"-I{include / 'torch/csrc/api/include'}",
        f"-L{torch_root / 'lib'}",
    ]
    sources = [f"csrc/{op}/{name}" for op in ops for name in ("launch.cu", "cuda.cpp")]
    link = ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_root / 'lib'}"]
    return library("operators_" + "_".join(ops), sources, extra, link)
