"""Docstrings as they are written: shapes such as [*, B, D] and products such as <x, y> are no Markdown.

Code spans and indented lines are left alone, since there a backslash would show.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")
ARGUMENT = re.compile(r"`?[a-z_]\w*`?(, `?\w+`?)*: ")


def plain(text: str) -> str:
    """The text with what Markdown would read as emphasis, HTML or a link escaped, outside of code and bullets.

    An argument that starts a line, as in "scale: of the scores", starts a paragraph.
    """
    found: list[str] = []
    code = True  # whether an indented line would be code: after a blank line, and after code
    for line in text.split("\n"):
        indented = line.startswith("    ")
        if not (indented and code):
            if ARGUMENT.match(line) and found and found[-1].strip():
                found.append("")
            code = not line.strip()
            line = _escaped(line.strip() if indented else line)
        found.append(line)
    return "\n".join(found)


def _escaped(line: str) -> str:
    bullet = re.match(r"\* ", line)
    head, rest = (line[:2], line[2:]) if bullet else ("", line)
    parts = CODE.split(rest)
    parts[::2] = [re.sub(r"([*\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return head + "".join(parts)


class Plain(griffe.Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
