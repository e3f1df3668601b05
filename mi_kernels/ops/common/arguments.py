"""Arguments of operators, declared once: named tuples from which an operator's schema is written and to which its flat
arguments are brought back.

An operator of torch takes a flat list. Its schema, its shape function, the kernels' dispatch and autograd would each
repeat that list; they name the tuples instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

SymInt = Annotated[int, "SymInt"]  # an integer that torch.compile may leave symbolic
# In place of a number: a float would be a constant of a compiled graph.
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
    """The arguments of an operator that takes the fields of these named tuples in order, as torch's schemas spell them;
    `prefix` goes before every name."""
    hints = [hint for kind in kinds for hint in get_type_hints(kind, include_extras=True).items()]
    return ", ".join(f"{_spelled(kind)} {prefix}{name}" for name, kind in hints)


def _spelled(kind: Any) -> str:
    return str(get_args(kind)[1]) if get_origin(kind) is Annotated else _TYPES[kind]


def split(arguments: Sequence[Any], *kinds: Any) -> list[Any]:
    """The flat arguments of an operator as instances of these named tuples, and the arguments that are left."""
    found, first = [], 0
    for kind in kinds:
        last = first + len(kind._fields)
        found.append(kind(*arguments[first:last]))
        first = last
    return [*found, *arguments[first:]]
