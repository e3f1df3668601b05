"""Checks the CUDA kernels by compiling them, without a GPU: `python -m tests.cuda_checks [--update]`.

Every csrc/**/*.cu is compiled for sm_80 and sm_90a. Register spills and stack frames fail. A kernel that uses more
registers or shared memory than tests/cuda_resources.json records also fails, if the record is from this version of
nvcc. The syntax of the torch glue (csrc/**/cuda.cpp) is checked against the installed torch and the toolkit's headers.
The emulator checks numerics (tests/ops/).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("cuda_resources.json")
ARCHITECTURES = ("80", "90a")
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-I" + str(ROOT / "csrc")]
Resources = dict[str, int]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    return found or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit_of(nvcc: str) -> Path:
    """The toolkit's folder as `nvcc --dryrun` prints it, because nvcc may be a wrapper in another place."""
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"TOP=(.+)", done.stderr)
    return Path(found[1].strip()).resolve() if found else Path(nvcc).resolve().parent.parent


def version_of(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else text.strip()


def readable(symbols: list[str]) -> dict[str, str]:
    """Mangled name -> name of the kernel with template arguments, without namespaces and parameters."""
    if shutil.which("c++filt") is None:
        return {s: s for s in symbols}
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    short = [re.sub(r"\b(\w+|\(anonymous namespace\))::", "", s) for s in done.stdout.splitlines()]
    return {s: re.sub(r"^void |\(.*$", "", name) for s, name in zip(symbols, short, strict=True)}


def parsed(log: str, ptx: str) -> dict[str, Resources]:
    """Symbol -> resources that ptxas reports, plus the dynamic shared memory that the kernel's PTX states."""
    dynamic = {}
    for body in ptx.split(".entry ")[1:]:
        notes = re.findall(r"dynamic shared memory: (\d+)", body)
        dynamic[body.split("(")[0].strip()] = max(map(int, notes), default=0)
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        symbol = entry.split("'")[0]
        numbers = {k: sum(map(int, re.findall(rf"(\d+) bytes {k}", entry))) for k in ("stack frame", "smem")}
        found[symbol] = {
            "registers": int(re.findall(r"Used (\d+) registers", entry)[0]),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", entry))),
            "stack": numbers["stack frame"],
            "shared": numbers["smem"] + dynamic.get(symbol, 0),
        }
    return found


def resources(nvcc: str, source: Path, architecture: str) -> dict[str, Resources]:
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        target = f"-arch=compute_{architecture}"
        subprocess.run([nvcc, *FLAGS, target, "-ptx", str(source), "-o", str(ptx)], check=True)
        command = [str(toolkit_of(nvcc) / "bin" / "ptxas"), "-v", "-O3", f"--gpu-name=sm_{architecture}", str(ptx)]
        done = subprocess.run([*command, "-o", f"{ptx}.cubin"], capture_output=True, text=True, check=True)
        rows = parsed(done.stdout + done.stderr, ptx.read_text())
    names = readable(list(rows))
    op = source.parent.name
    return {f"{op}/{names[symbol]}/sm_{architecture}": row for symbol, row in rows.items()}


def complaints(rows: dict[str, Resources], version: str) -> list[str]:
    spilled = [n for n, r in rows.items() if r["spill_bytes"] or r["stack"]]
    found = [f"{n}: spills {rows[n]['spill_bytes']} bytes, stack {rows[n]['stack']}" for n in spilled]
    recorded = json.loads(RECORD.read_text())
    if recorded["nvcc"] != version:
        return found
    old = recorded["kernels"]
    found += [f"{n}: not in {RECORD.name}; --update writes it" for n in rows if n not in old]
    found += [f"{n}: in {RECORD.name}, but no longer compiled" for n in old if n not in rows]
    for n in sorted(old.keys() & rows.keys()):
        worse = [k for k in ("registers", "shared") if rows[n][k] > old[n][k]]
        found += [f"{n}: {k} recorded {old[n][k]}, now {rows[n][k]}" for k in worse]
    return found


def glue_errors(nvcc: str) -> list[str]:
    """The errors that g++ reports for the torch glue; empty if there is no g++."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return []
    import torch

    include = Path(torch.__file__).parent / "include"
    toolkit = toolkit_of(nvcc) / "include"
    # A CPU build of torch lacks one generated header; this macro replaces it.
    flags = ["-std=c++20", "-fsyntax-only", "-DMI_KERNELS_WITH_CUDA=1", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    folders = [toolkit, ROOT / "csrc", include, include / "torch/csrc/api/include"]
    found = []
    for source in sorted(ROOT.glob("csrc/*/cuda.cpp")):
        command = [compiler, *flags, *(f"-I{folder}" for folder in folders), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            found.append(f"{source.relative_to(ROOT)}: {done.stderr[-3000:]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record the resources")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA checks: skipped, there is no nvcc")
        return 0
    version = version_of(nvcc)
    jobs = [(source, a) for source in sorted(ROOT.glob("csrc/**/*.cu")) for a in ARCHITECTURES]
    rows: dict[str, Resources] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(lambda job: resources(nvcc, *job), jobs):
            rows |= part
    rows = dict(sorted(rows.items()))
    for name, r in rows.items():
        print(f"{name:76} registers {r['registers']:3}  shared {r['shared']:6}  spill {r['spill_bytes']}")
    if args.update:
        text = json.dumps({"nvcc": version, "kernels": rows}, indent=1)
        RECORD.write_text(re.sub(r"\n {3}| *\n {2}(?=\})", " ", text) + "\n")
    found = complaints(rows, version) + glue_errors(nvcc)
    for line in found:
        print(line)
    print(f"CUDA checks: {len(rows)} kernels, {len(found)} failures")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
