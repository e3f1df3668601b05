"""Docstrings as they are written: shapes such as [*, B, D] and products such as <x, y> are no Markdown.

Code spans and indented lines are left alone, since there a backslash would show.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")


def plain(text: str) -> str:
    """The text with what Markdown would read as emphasis, HTML or a link escaped, outside of code and bullets."""
    lines = text.split("\n")
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in lines)


def _escaped(line: str) -> str:
    bullet = re.match(r"\* ", line)
    head, rest = (line[:2], line[2:]) if bullet else ("", line)
    parts = CODE.split(rest)
    parts[::2] = [re.sub(r"([*<\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return head + "".join(parts)


class Plain(griffe.Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
