"""Runs the tests of the compiled operators with AddressSanitizer and UndefinedBehaviorSanitizer in the C++ code.

`python -m tools.sanitize [PART ...]`, or `make sanitize` for all parts, builds a copy of the package in build/sanitize
and runs the tests of the operators on it; the first error ends the run with a stack trace. A part is a key of PARTS.
Arguments after `--` are passed to pytest instead of the tests of the parts. The runtime libraries of gcc are needed and
are loaded before torch. Leaks are not checked, because Python and torch hold memory until they exit. Under
AddressSanitizer the library does not reuse small buffers, and the padding behind a buffer counts as out of bounds.
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
# Tests that compare processes, compile torch programs or run Triton have no C++ code of ours that the others lack.
PARTS = {
    "club": ("tests/ops/club/test_club.py",),
    "rbf": ("tests/ops/rbf/test_far_rows.py", "tests/ops/rbf/test_derivatives.py"),
    "dot": ("tests/ops/dot_critic/test_dot_critic.py",),
    "mlp": ("tests/ops/mlp_critic/test_mlp_critic.py", "tests/ops/mlp_critic/test_short_types.py"),
    "attention": ("tests/ops/cross_attention/test_cross_attention.py",),
    "lstm": ("tests/ops/lstm_scan/test_lstm_scan.py",),
    "losses": ("tests/losses/test_contrastive.py", "tests/losses/test_divergences.py"),
    "values": ("tests/losses/test_fuzz_values.py",),
}
SKIP = "not compile and not opcheck and not memory and not triton"


def runtime(compiler: str, library: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_absolute():
        raise SystemExit(f"tools.sanitize: {compiler} has no {library}")
    return found.strip()


def environment(compiler: str) -> dict[str, str]:
    # libstdc++ beside libasan: its exceptions must be found when libasan wraps them.
    preload = " ".join(runtime(compiler, name) for name in ("libasan.so", "libstdc++.so"))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build() -> None:
    command = [sys.executable, "setup.py", "build", "--build-lib", str(BUILD / "lib"),
               "--build-temp", str(BUILD / "objects")]  # fmt: skip
    mode = {"MI_KERNELS_BUILD": "cpu", "MI_KERNELS_SANITIZE": "1"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **mode}, check=True)
    if not list((BUILD / "lib" / "mi_kernels").glob("_C*.so")):
        raise SystemExit("tools.sanitize: the build has no extension (its output is above)")


def chosen(arguments: list[str]) -> list[str]:
    """The arguments for pytest."""
    if arguments[:1] == ["--"]:
        return arguments[1:]
    unknown = [name for name in arguments if name not in PARTS]
    if unknown:
        raise SystemExit(f"tools.sanitize: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return ["-k", SKIP, *(path for name in arguments or PARTS for path in PARTS[name])]


def main() -> int:
    tests = chosen(sys.argv[1:])
    build()
    # The sanitized package in front of the checkout's.
    first = ["-o", f"pythonpath={BUILD / 'lib'} ."]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *first, *tests]
    return subprocess.run(command, cwd=ROOT, env=environment(os.environ.get("CXX", "c++").split()[0])).returncode


if __name__ == "__main__":
    sys.exit(main())
