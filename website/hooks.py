"""What mkdocs does beyond its plugins: formulas become MathML, and links out of docs/ lead to copies in the site.

A page links to a file of the repository by its relative path, ../examples/clip_loop.py, so that the link also works
where the repository itself is browsed. On the site the file lies under source/.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(\.\./[^)#\s]+)")


def target_of(page: str, link: str) -> str | None:
    """The path in the repository that a link of a page of docs/ has, if it is a file outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    inside = path.startswith(("..", "docs/"))
    return None if inside or not (ROOT / path).is_file() else path


def on_files(files: Files, config: Any) -> Files:
    """Adds every file outside docs/ that a page links to."""
    wanted = set()
    for page in files.documentation_pages():
        text = Path(str(page.abs_src_path)).read_text()
        wanted |= {target_of(page.src_uri, found[2]) for found in LINK.finditer(text)}
    for path in sorted(filter(None, wanted)):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links out of docs/ into links to source/. A broken one stays, and mkdocs warns of it."""

    def moved(found: re.Match[str]) -> str:
        path = target_of(page.file.src_uri, found[2])
        if path is None:
            return found[0]
        return found[1] + os.path.relpath(f"source/{path}", posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas, which arithmatex has marked, as MathML: browsers draw it without a script."""

    def drawn(found: re.Match[str]) -> str:
        source = html.unescape(found[2])
        display = "block" if found[1] == "div" else "inline"
        return convert(source[2:-2].strip(), display=display)

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', drawn, content, flags=re.S)
