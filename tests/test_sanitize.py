"""`make sanitize` covers every operator that has CPU code, with tests that exist."""

from pathlib import Path

import pytest

from tools import sanitize

ROOT = Path(__file__).resolve().parent.parent


def test_every_operator_with_cpu_code_has_tests() -> None:
    paths = [path for part in sanitize.PARTS.values() for path in part]
    tested = {path.split("/")[2] for path in paths if path.startswith("tests/ops/")}
    assert {path.parent.name for path in (ROOT / "csrc").glob("*/cpu.cpp")} == tested
    assert all((ROOT / path).is_file() for path in paths)


def test_parts_are_chosen_by_name() -> None:
    assert sanitize.chosen(["lstm"])[-1:] == list(sanitize.PARTS["lstm"])
    assert len(sanitize.chosen([])) == 2 + sum(map(len, sanitize.PARTS.values()))
    assert sanitize.chosen(["--", "-k", "tiny"]) == ["-k", "tiny"]
    with pytest.raises(SystemExit, match="no part 'attenton'; there are club"):
        sanitize.chosen(["attenton"])
