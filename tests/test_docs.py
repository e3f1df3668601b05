"""README.md and docs/: every Python block runs, every command parses, every link has a target, every table is current.

The blocks of a page run in order, in one namespace and one empty folder, as if a reader pasted them. `estimate_mi`
takes fewer steps. docs/extending.md has its own test, tests/test_docs_extending.py.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from pathlib import Path

import pytest

import mi_kernels as mk
from bench import readme

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
QUOTED = re.compile(r"# from (examples/\w+\.py)\n")
RUN_ELSEWHERE = {"docs/extending.md"}


def fences(page: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(PAGES[page].read_text()) if found == language]


WITH_CODE = [page for page in PAGES if fences(page, "python") and page not in RUN_ELSEWHERE]


@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mk, "estimate_mi", functools.partial(mk.estimate_mi, max_steps=50))
    names: dict[str, object] = {"__name__": "page"}
    for code in fences(page, "python"):
        quoted = QUOTED.match(code)
        if quoted:  # an excerpt of a script that tests/examples runs
            assert code[quoted.end() :].strip("\n") in (ROOT / quoted[1]).read_text(), f"{page}: not in {quoted[1]}"
        else:
            exec(compile(code, page, "exec"), names)


def test_blocks_were_found() -> None:
    assert {"README.md", "docs/index.md", "docs/own-arrays.md", "docs/ops/dot-critic.md"} <= set(WITH_CODE)


def shell_lines(page: str) -> list[str]:
    lines = [line for code in fences(page, "sh") + fences(page, "") for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun|make|pip) ", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if shell_lines(page)])
def test_commands_parse(page: str) -> None:
    from mi_kernels.__main__ import main
    from models.__main__ import parser
    from models.settings import parse_changes

    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "models"]:
            found = parser().parse_args(words[3:])
            parse_changes(getattr(found, "set", []))
        elif words[:3] == ["python", "-m", "mi_kernels"]:
            with pytest.raises(SystemExit) as stopped:
                main([words[3], "--help"])
            assert stopped.value.code == 0, line
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), line
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1] == "-m", line


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and code hosts generate them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    text = FENCE.sub("", PAGES[page].read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert target.is_relative_to(ROOT) and target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", readme.PAGES)
def test_measured_sections_are_what_was_measured(page: str) -> None:
    """The sections are up to date: `python -m bench.readme` would change nothing."""
    text = (ROOT / page).read_text()
    assert readme.rewritten(page, text, readme.PAGES[page]) == text


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_place_of_this_machine(page: str) -> None:
    text = PAGES[page].read_text()
    assert not re.search(r"(?<![\w.])/(?:home|work|root|tmp|opt|usr)/", text), page
    assert str(ROOT) not in text and os.environ.get("HOSTNAME", "no host") not in text


def test_the_table_of_systems_and_its_page_name_the_same_systems() -> None:
    """The systems in README.md's table are the sections of docs/systems.md, in the same order and with the same
    links."""
    rows = re.findall(r"^\| (\[\w+\]\(docs/\w+\.md\), [^|]+?) \|", PAGES["README.md"].read_text(), flags=re.M)
    sections = re.findall(r"^## (\[.+)$", PAGES["docs/systems.md"].read_text(), flags=re.M)
    assert rows and [row.replace("(docs/", "(") for row in rows] == sections


def test_the_readme_is_a_screen_and_a_half() -> None:
    """README.md has at most 65 lines that are not blank."""
    assert sum(bool(line.strip()) for line in PAGES["README.md"].read_text().splitlines()) <= 65


ENTRY = re.compile(r"^@(\w+)\{(\w+),\n(.*?)^\}$", flags=re.S | re.M)


def test_citations_are_whole() -> None:
    """Every BibTeX entry has its fields, braces are balanced, and the table names exactly the entries."""
    page = PAGES["docs/citing.md"].read_text()
    entries = {key: (kind, body) for kind, key, body in ENTRY.findall(page)}
    assert len(entries) == page.count("\n@") and page.count("{") == page.count("}")
    for key, (kind, body) in entries.items():
        fields = dict(re.findall(r"(\w+) = \{(.+?)\}(?=,|\n)", body))
        venue = {"inproceedings": "booktitle", "article": "journal", "misc": "eprint"}[kind]
        assert {"title", "author", "year", venue} <= set(fields), key
        assert re.fullmatch(r"\d{4}", fields["year"]) and fields["year"] in key
        assert re.fullmatch(r"\d{4}\.\d{5}", fields.get("eprint", "0000.00000")), key
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("|")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(entries)
