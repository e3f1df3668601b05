"""GCC vectorises the loops over a tile of scores, which it stops doing as soon as a choice in them becomes a branch.

A loop that is left scalar takes several times as long and gives the same numbers, so no other test would notice.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HEADERS = [
    "dot_critic/tile.h",
    "mlp_critic/scores.h",
    "rbf/near.h",
    "rbf/mmd_tile.h",
    "rbf/hsic_tile.h",
    "lstm_scan/cell.h",
]
LOOP = re.compile(r"^\s*for \(int64_t j .*; \+\+j\)")
COMPILER = os.environ.get("CXX") or "c++"


@functools.cache
def is_gcc_on_x86() -> bool:
    if shutil.which(COMPILER) is None:
        return False
    macros = subprocess.run([COMPILER, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    return "__GNUC__" in macros and "__clang__" not in macros and "__x86_64__" in macros


@functools.cache
def options() -> list[str]:
    """The compiler's options in setup.py, read from its text: importing it would build the package."""
    named = {"OPENMP", "CXX_FLAGS"}
    tree = ast.parse((ROOT / "setup.py").read_text())
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in named]
    assert len(found) == len(named)
    return [c.value for value in found for c in ast.walk(value) if isinstance(c, ast.Constant)]


def report(source: str, folder: Path) -> dict[int, Counter[str]]:
    """What GCC says of the loops of a header, by line: how often one was vectorised, how often it gave up on one."""
    unit = folder / "unit.cpp"
    unit.write_text(f'#include "{source}"\n')
    once = ["-march=x86-64-v3", "-DMK_CLONES=", "-fkeep-static-functions", "-fopt-info-vec-all"]
    command = [COMPILER, *options(), *once, f"-I{CSRC}", "-c", str(unit), "-o", str(folder / "unit.o")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    lines: dict[int, Counter[str]] = {}
    for line in found.stderr.splitlines():
        said = re.match(
            rf"\S*{re.escape(source)}:(\d+):\d+: (optimized: loop vectorized|missed: couldn't vectorize loop)", line
        )
        if said:
            lines.setdefault(int(said[1]), Counter())["yes" if said[2].startswith("optimized") else "no"] += 1
    return lines


def left_scalar(source: str, folder: Path) -> list[str]:
    """The loops over columns that GCC vectorised neither for float nor for double."""
    text = (CSRC / source).read_text().splitlines()
    said = report(source, folder)
    assert any(counts["yes"] for counts in said.values()), "GCC reported no loop: the test would see nothing"
    return [
        f"{source}:{number}: {text[number - 1].strip()}"
        for number, counts in said.items()
        if LOOP.match(text[number - 1]) and counts["no"] and not counts["yes"]
    ]


@pytest.mark.skipif(not is_gcc_on_x86(), reason="reads the report of GCC for x86-64")
@pytest.mark.parametrize("source", HEADERS)
def test_loops_over_columns_are_vectorised(source: str, tmp_path: Path) -> None:
    assert left_scalar(source, tmp_path) == []
