"""The settings of a model in words: their defaults, and the docstrings of the classes that hold them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from models.registry import entry
from models.settings import Nested, dump, from_dict


def described(name: str, data: str) -> str:
    """All settings of a model: the defaults as a YAML file for --config, then what they mean.

    Raises ValueError for an unknown model.
    """
    config = from_dict({"model": {"name": name}, "data": {"name": data}})
    lines = [f"{name}: {entry(name).summary}", "", "# defaults; change one with --set model.NAME=VALUE"]
    lines += [dump(config).rstrip()]
    for part in ("model", "data", "training"):
        for where, text in _explained(part, getattr(config, part)):
            lines += ["", f"# {where}", text]
    return "\n".join(lines)


def _explained(where: str, settings: Any) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a dataclass of settings, of those that it extends, and of those inside it."""
    for kind in type(settings).__mro__:
        text = vars(kind).get("__doc__") or ""
        generated = text.startswith(f"{kind.__name__}(")  # a dataclass without a docstring gets its signature
        if is_dataclass(kind) and text and not generated:
            yield where, inspect.cleandoc(text)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Nested):
            yield f"{where}.{field.name}", f"settings of {value.name}: python -m models list {value.name}"
        elif is_dataclass(value):
            yield from _explained(f"{where}.{field.name}", value)
