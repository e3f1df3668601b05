"""The website's mkdocs extensions: docstrings shown literally, formulas as MathML, links to the repository's files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"website_{name}", ROOT / "website" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


WRITTEN = ("x [*, B, D] and y [*, N, D]", "scale <a(x), b(y)> and 2 * 3", "_private and last_", "* a point: `[*]`, [*]")


@pytest.mark.parametrize("text", WRITTEN)
def test_docstrings_read_as_they_are_written(text: str) -> None:
    pytest.importorskip("griffe")
    markdown = pytest.importorskip("markdown")
    page = markdown.markdown(load("docstrings").plain(text))
    shown = re.sub(r"<[^>]*>", "", page).replace("&lt;", "<").replace("&gt;", ">").strip()
    assert shown == text.removeprefix("* ").replace("`", "")
    assert "<em>" not in page and ("<li>" in page) == text.startswith("* ")


def test_indented_code_in_docstrings_is_left_alone() -> None:
    pytest.importorskip("griffe")
    assert load("docstrings").plain("    S[i] = <x, y> * 2") == "    S[i] = <x, y> * 2"


def test_arguments_in_docstrings_are_paragraphs() -> None:
    pytest.importorskip("griffe")
    text = "Sums.\n\nscale: of the scores,\n    [*] or a number.\nids: integers."
    assert load("docstrings").plain(text) == "Sums.\n\nscale: of the scores,\n\\[\\*\\] or a number.\n\nids: integers."


def test_formulas_become_mathml() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    found = load("hooks").on_page_content(r'<p><span class="arithmatex">\(a_i &lt; b\)</span></p>')
    assert found.startswith("<p><math") and "<msub>" in found and "arithmatex" not in found


def test_links_out_of_docs_lead_to_copies() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    hooks = load("hooks")
    assert hooks.target_of("ops/index.md", "../../CHANGELOG.md") == "CHANGELOG.md"
    assert hooks.target_of("ops/index.md", "../benchmarks.md") is None
    assert hooks.target_of("index.md", "../examples/nothing.py") is None
    assert hooks.target_of("index.md", "../../outside.md") is None
