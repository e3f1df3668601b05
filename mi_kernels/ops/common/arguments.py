"""Operator arguments as named tuples. The tuples generate an operator's schema, and flat arguments convert back to
tuples.

A torch operator takes a flat list of arguments. With named tuples, the schema, the shape function, the dispatch and
autograd do not have to repeat that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

SymInt = Annotated[int, "SymInt"]  # an integer that torch.compile may leave symbolic
# A tensor instead of a number, because torch.compile treats a float as a constant of the graph.
NumberTensor = Annotated[float, "Tensor"]

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[int]: "SymInt[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
}


def schema(*kinds: type, prefix: str = "") -> str:
    """The argument list, in torch's schema syntax, of an operator that takes the fields of these named tuples in order.
    `prefix` is prepended to every name."""
    hints = [hint for kind in kinds for hint in get_type_hints(kind, include_extras=True).items()]
    return ", ".join(f"{_spelled(kind)} {prefix}{name}" for name, kind in hints)


def _spelled(kind: Any) -> str:
    return str(get_args(kind)[1]) if get_origin(kind) is Annotated else _TYPES[kind]


def split(arguments: Sequence[Any], *kinds: Any) -> list[Any]:
    """Converts the flat arguments of an operator to these named tuples; returns them and the remaining arguments."""
    found, first = [], 0
    for kind in kinds:
        last = first + len(kind._fields)
        found.append(kind(*arguments[first:last]))
        first = last
    return [*found, *arguments[first:]]
