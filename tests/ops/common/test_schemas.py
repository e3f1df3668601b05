"""Constants and names that are defined in C++ and in Python agree: csrc/<op>/schema.h,
mi_kernels/ops/<op>/schema.py."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
HEADERS = sorted(SOURCES.glob("*/schema.h"))
ENUM = r"enum(?:\s+class)?\s+\w+\s*:\s*int64_t\s*\{([^}]*)\}"


def snake(name: str) -> str:
    """kRowLse -> ROW_LSE, kNeedH0 -> NEED_H0."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removeprefix("k")).upper()


def stated(header: str) -> dict[str, int | tuple[str, ...]]:
    """Enumerators, constants and arrays of names in a header: Python's name -> value."""
    text = re.sub(r"//[^\n]*", "", header)
    found: dict[str, int | tuple[str, ...]] = {}
    numbers = [*re.findall(ENUM, text), *re.findall(r"constexpr\s+int\w*\s+([^;{]*);", text)]
    for body in numbers:
        for part in filter(None, (p.strip() for p in body.split(","))):
            name, value = re.fullmatch(r"(\w+)\s*=\s*(\d+)", part).groups()  # type: ignore[union-attr]
            found[snake(name)] = int(value)
    for name, body in re.findall(r"constexpr\s+const\s+char\s*\*\s*(\w+)\[\]\s*=\s*\{([^}]*)\}", text):
        found[snake(name)] = tuple(re.findall(r'"(\w+)"', body))
    return found


def test_the_parser_reads_what_headers_state() -> None:
    header = """// enum Not : int64_t { kNot = 1 };
    enum Stats : int64_t {
      kRowLse = 1,  // a comment, with a comma
      kNeedH0 = 2,
    };
    constexpr int64_t kTile = 64, kStep = 16;
    constexpr const char* kNames[] = {"one", "two"};"""
    assert stated(header) == {"ROW_LSE": 1, "NEED_H0": 2, "TILE": 64, "STEP": 16, "NAMES": ("one", "two")}
    with pytest.raises(AttributeError):
        stated("enum Stats : int64_t { kRowLse };")


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.parent.name)
def test_schemas_state_the_same(header: Path) -> None:
    module = import_module(f"mi_kernels.ops.{header.parent.name}.schema")
    said = stated(header.read_text())
    assert said
    assert {name: getattr(module, name, None) for name in said} == said


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.parent.name)
def test_no_other_source_copies_them(header: Path) -> None:
    """Enumerations with values are defined only in an operator's schema.h, not in its other sources."""
    for source in sorted(header.parent.iterdir()):
        if source != header:
            bodies = re.findall(ENUM, source.read_text())
            assert not any("=" in body for body in bodies), source


def test_operators_with_bits_have_a_header() -> None:
    assert {header.parent.name for header in HEADERS} == {p.parent.name for p in SOURCES.glob("*/cpu.cpp")}
