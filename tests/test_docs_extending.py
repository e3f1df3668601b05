"""docs/extending.md: its paths exist, and its recipe for a bound works in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mi_kernels.bounds import registry

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
NEW = ("mi_kernels/bounds/decoupled.py", "tests/bounds/test_decoupled.py")
SUFFIXES = (".py", ".md", ".h", ".cpp", ".json", ".toml")

AFTERWARDS = """
import sys
import pytest
from mi_kernels.__main__ import main
code = pytest.main(["-q", "-p", "no:cacheprovider", "tests/bounds", "-k", "decoupled"])
assert code == 0, code
try:
    main(["estimate", "--help"])
except SystemExit:
    pass
main(["bounds"])
"""


def paths() -> list[str]:
    """What stands in backticks or as a link's target and is a path, not a command or an expression."""
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.S | re.M)
    found = [*re.findall(r"`([^`\s]+)`", text), *re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    return sorted({p for p in found if re.fullmatch(r"[\w./-]+", p) and (p.endswith(("/", *SUFFIXES)))})


def test_every_path_on_the_page_exists() -> None:
    # file names within a folder named before them
    found = [p for p in paths() if "/" in p or p in ("README.md", "pyproject.toml", "setup.py")]
    assert len(found) > 40
    missing = [p for p in found if p not in NEW and not (ROOT / p).exists()]
    assert not missing
    assert not any((ROOT / p).exists() for p in NEW)


def block(path: str) -> str:
    """The code block that follows the path on the page."""
    found = re.search(rf"`{re.escape(path)}`:\n\n```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    assert found, f"no code for {path}"
    return found[1]


def test_two_files_get_a_bound_estimated_tested_and_listed(tmp_path: Path) -> None:
    if "MI_KERNELS_TEST_DEVICE" in os.environ:
        pytest.skip("the copy runs on the CPU")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("mi_kernels", "tests/bounds"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for path in NEW:
        (tmp_path / path).write_text(block(path))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AFTERWARDS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # two tests of its own, and those that test_registry.py runs on every bound
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 2 + 8, done.stdout
    choices = re.search(r"--estimator \{(.*?)\}", done.stdout.replace("\n", ""))
    assert choices and "decoupled" in choices[1].replace(" ", "").split(",")
    listed = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    added = set(listed) - set(registry.table())
    assert len(added) == 1 and added.pop().startswith("| `decoupled` | `Decoupled` | upper | ")
