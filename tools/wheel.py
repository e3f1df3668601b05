"""Builds an sdist and a wheel whose name and metadata state the platforms and torch versions that it supports.

`python -m tools.wheel [--out dist] [--built]` builds both; `make wheel` calls it. The wheel is built from the sdist, so
that files in build/ do not get into it, and files missing from the sdist are noticed.

The C++ library of a wheel is linked against libtorch, whose ABI changes with every minor version of torch, and against
the libc of the machine that built it. So a wheel with a compiled library

* carries the version of torch as its local version, `0.1.0+torch2.13.cpu`, and requires that minor version: pip refuses
  another torch, with which the library would not load and plain Python would run in its place;
* has the platform tag of the oldest libc and libstdc++ that have the symbols which the library asks for.

A wheel without a library runs with every torch that pyproject.toml names, on any machine, and is left as it is.
`--built` packs the library that stands in mi_kernels/ instead of compiling it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Newest symbol versions of libstdc++ and of libgcc's C++ runtime in the distribution that a platform tag stands for, as
# the manylinux policies list them: glibc's minor version, GLIBCXX_3.4.?, CXXABI_1.3.?
PROFILES = (
    (17, 19, 7), (24, 22, 10), (26, 24, 11), (28, 25, 11), (31, 28, 12), (34, 29, 13), (35, 30, 13), (39, 33, 15)
)  # fmt: skip
# torch brings its own libgomp, loaded before ours asks for it.
FROM_TORCH = re.compile(r"lib(torch|c10|gomp|cudart)[\w.+-]*\.so")
FROM_PLATFORM = re.compile(r"(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux[\w-]*)\.so")


def run(*command: str | Path, **environment: str) -> str:
    """Output of a command; SystemExit with what it printed where it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", run("readelf", "-dW", library))


def newest(library: Path, symbol: str) -> int:
    """Last part of the highest version of a family of symbols, such as GLIBC_2.34 for "GLIBC_2."; 0 without one."""
    return max((int(found) for found in re.findall(rf"\b{re.escape(symbol)}(\d+)", run("readelf", "-VW", library))),
               default=0)  # fmt: skip


def platform_tag(library: Path) -> str:
    """manylinux_2_?_<machine> of the oldest platform that has every symbol, or linux_<machine> where none is known or
    the library needs another one that neither the platform nor torch brings."""
    machine = os.uname().machine
    foreign = [name for name in needed(library) if not (FROM_TORCH.match(name) or FROM_PLATFORM.match(name))]
    if foreign:
        print(f"tools.wheel: no manylinux tag, the library needs {', '.join(foreign)}", file=sys.stderr)
        return f"linux_{machine}"
    libc = newest(library, "GLIBC_2.")
    stdcxx, abi = newest(library, "GLIBCXX_3.4."), newest(library, "CXXABI_1.3.")
    fitting = [minor for minor, x, c in PROFILES if stdcxx <= x and abi <= c]
    return f"manylinux_2_{max(libc, fitting[0])}_{machine}" if fitting else f"linux_{machine}"


def torch_release() -> tuple[str, str]:
    """Minor version of torch as 2.13, and what it was built for, as cpu or cu126."""
    version = run(sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)").split()
    release = ".".join(version[0].split("+")[0].split(".")[:2])
    return release, "cpu" if version[1] == "None" else "cu" + version[1].replace(".", "")


def labelled_metadata(text: str, release: str, local: str) -> str:
    """METADATA with the local version and torch's minor version. Raises ValueError where torch is not required."""
    version = message_from_string(text)["Version"]
    found, count = re.subn(r"(?m)^Requires-Dist: torch>=.*$", f"Requires-Dist: torch=={release}.*", text)
    if count != 1:
        raise ValueError(f"METADATA must require torch once, got {count} lines")
    return found.replace(f"\nVersion: {version}\n", f"\nVersion: {version.split('+')[0]}+{local}\n", 1)


def label(wheel: Path, out: Path) -> Path:
    """The wheel under its honest name, in `out`; one without a library is copied."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "wheel", "unpack", wheel, "--dest", folder)
        (tree,) = Path(folder).iterdir()
        libraries = list(tree.glob("mi_kernels/_C*.so"))
        if not libraries:
            return Path(shutil.copy(wheel, out))
        release, built_for = torch_release()
        local = f"torch{release}.{built_for}"
        (info,) = tree.glob("*.dist-info")
        metadata = info / "METADATA"
        metadata.write_text(labelled_metadata(metadata.read_text(), release, local))
        info.rename(info.with_name(f"{info.name.removesuffix('.dist-info')}+{local}.dist-info"))
        packed = Path(folder) / "packed"
        packed.mkdir()
        run(sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", packed)
        (found,) = packed.iterdir()
        # No module of the library has Python in it, so that any Python that the package admits will do.
        tags = ("--python-tag", "py3", "--abi-tag", "none", "--platform-tag", platform_tag(libraries[0]))
        run(sys.executable, "-m", "wheel", "tags", "--remove", *tags, found)
        (found,) = packed.iterdir()
        return Path(shutil.copy(found, out))


def build_sdist(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    return out / run(sys.executable, "-c", code, out.resolve()).split()[-1]


def build_wheel(sdist: Path, out: Path, mode: str = "") -> Path:
    """A labelled wheel of an sdist. `mode`: MI_KERNELS_BUILD; "built" packs the library of this checkout."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(sdist, folder, filter="data")
        (tree,) = Path(folder).iterdir()
        if mode == "built":
            for library in (ROOT / "mi_kernels").glob("_C*.so"):
                shutil.copy(library, tree / "mi_kernels")
        pip = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder)
        run(sys.executable, *pip, tree, MI_KERNELS_BUILD=mode)
        (wheel,) = Path(folder).glob("*.whl")
        return label(wheel, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--built", action="store_true", help="pack mi_kernels/_C*.so as it is")
    options = parser.parse_args()
    sdist = build_sdist(options.out)
    print(sdist)
    print(build_wheel(sdist, options.out, "built" if options.built else os.environ.get("MI_KERNELS_BUILD", "")))


if __name__ == "__main__":
    main()
