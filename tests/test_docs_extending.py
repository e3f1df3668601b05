"""docs/extending.md: its paths exist, and its recipes work in a copy of the tree."""

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
BOUND = ("mi_kernels/bounds/decoupled.py", "tests/bounds/test_decoupled.py")
MODEL = ("models/baselines/linear.py", "tests/models/test_linear.py")
FORMAT = ("models/data/formats/jsonl.py", "tests/models/data/test_jsonl.py")
SOURCE = ("models/data/sources/iris.py", "tests/models/data/test_iris.py")
NEW = (*BOUND, *MODEL, *FORMAT, *SOURCE)
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
    """All paths in backticks or link targets; commands and expressions are not paths."""
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.S | re.M)
    found = [*re.findall(r"`([^`\s]+)`", text), *re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    return sorted({p for p in found if re.fullmatch(r"[\w./-]+", p) and (p.endswith(("/", *SUFFIXES)))})


def test_every_path_on_the_page_exists() -> None:
    # other bare file names refer to a folder that the page names before them
    found = [p for p in paths() if "/" in p or p in ("README.md", "pyproject.toml", "setup.py")]
    assert len(found) > 40
    missing = [p for p in found if p not in NEW and not (ROOT / p).exists()]
    assert not missing
    assert not any((ROOT / p).exists() for p in NEW)


def block(path: str) -> str:
    """The page's code block directly after a path: the whole content of that file."""
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
    for path in BOUND:
        (tmp_path / path).write_text(block(path))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AFTERWARDS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # two tests of the new bound, and those that test_registry.py runs for every bound
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 2 + 8, done.stdout
    choices = re.search(r"--estimator \{(.*?)\}", done.stdout.replace("\n", ""))
    assert choices and "decoupled" in choices[1].replace(" ", "").split(",")
    listed = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    added = set(listed) - set(registry.table())
    assert len(added) == 1 and added.pop().startswith("| `decoupled` | `Decoupled` | upper | ")


def snippet(path: str) -> str:
    """The page's first code block after a mention of the path: lines to add to that file."""
    found = re.search(rf"`{re.escape(path)}`(?:(?!```).)*?:\n\n```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    assert found, f"no code for {path}"
    return found[1]


def changed(root: Path, path: str, place: str, added: str) -> None:
    """Inserts ``added`` after ``place``, which must occur exactly once in the file."""
    text = (root / path).read_text()
    assert text.count(place) == 1, (path, place)
    (root / path).write_text(text.replace(place, place + added))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> str:
    """pytest's output in a copy of the tree with the page's model, format and data set."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("models", "tests/models"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "mi_kernels").symlink_to(ROOT / "mi_kernels")
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, root / name)
    for path in (*MODEL, *FORMAT, *SOURCE):
        (root / path).write_text(block(path))
    registry_file, helpers = "models/registry.py", "tests/models/helpers.py"
    changed(root, registry_file, "MODELS: dict[str, Entry] = {\n", snippet(registry_file))
    changed(root, registry_file, "from models.baselines import contrastive, fusion, ", "linear, ")
    changed(root, helpers, "\nSMALL = {\n", snippet(helpers))
    formats, sources = "models/data/formats/__init__.py", "models/data/sources/__init__.py"
    changed(root, formats, "from models.data.formats import (\n", "    jsonl,\n")
    changed(root, formats, "PATHS: tuple[ModuleType, ...] = (\n", "    jsonl,\n")
    changed(root, sources, "from models.data.sources import (\n", "    iris,\n")
    changed(root, sources, "MODULES: dict[str, ModuleType] = {\n", snippet(sources))
    with (root / "tests/models/data/writers.py").open("a") as file:
        file.write(snippet("tests/models/data/test_fuzz.py"))
    tests = [MODEL[1], FORMAT[1], SOURCE[1]]
    shared = ["tests/models/test_training.py", "tests/models/data/test_fuzz.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests, *shared]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    own = "test_linear or test_jsonl or test_iris or every_model_trains and linear or mutated and jsonl"
    done = subprocess.run([*command, "-k", own], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "passed",
    [
        (MODEL[1], "test_every_model_trains_and_comes_back_from_its_folder[linear]"),
        (FORMAT[1], "test_mutated_files_are_read_or_refused_in_one_sentence[jsonl]"),
        (SOURCE[1], "test_a_model_trains_on_it_by_name"),
    ],
    ids=["model", "format", "data set"],
)
def test_recipes_of_models_work_in_a_copy(extended: str, passed: tuple[str, ...]) -> None:
    lines = extended.splitlines()
    for name in passed:
        assert any(name in line and "PASSED" in line for line in lines), name
