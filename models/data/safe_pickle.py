"""Reads pickles that hold numpy arrays and plain containers, and nothing else; nothing in the file is ever called.

``pickle.load`` runs whatever a file asks for, so it is not used. ``pickletools.genops`` takes the file apart into
opcodes, and the small machine below gives them the meaning that data needs: numbers, strings, lists, tuples,
dictionaries, sets and arrays. Globals are looked up in one table (``ADMITTED``); any other is refused by its name.
Arrays are built from their bytes with ``np.frombuffer`` after dtype, shape and size have been compared, never by
numpy's own ``__setstate__``. Python 2 pickles (protocols 0 to 2, ``numpy.core``, byte strings) read like those of
Python 3.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from models.data.pickle_objects import ADMITTED, Array, Dtype, Global, OldString, Refused, checked_key, text_of

MAX_DEPTH = 64


def load(path: str | Path) -> Any:
    """The object in a pickle file: arrays, numbers, strings and plain containers of them.

    Byte strings of Python 2 become str (UTF-8, else Latin-1). Tuples, sets and bytes stay what they are.
    Raises FileNotFoundError, or ValueError that names the file and what is wrong: a global that is no array or
    container, a truncated or malformed stream, more than one object. Costs one pass over the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        try:
            return _resolve(_Machine().run(stream))
        except Refused as error:
            raise ValueError(f"{path} {error}") from None
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"{path} is not a complete pickle: {reason}") from error


class _Machine:
    """The stack, the marks and the memo of a pickle; one entry of ``_VALUES`` or ``_METHODS`` an opcode."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: mmap.mmap) -> Any:
        last = 0
        for opcode, arg, position in pickletools.genops(cast(IO[bytes], stream)):
            last = position or 0
            name = opcode.name
            if name in _VALUES:
                self.stack.append(_VALUES[name](arg))
            elif name == "STOP":
                break
            elif name not in ("PROTO", "FRAME"):
                method = _METHODS.get(name)
                if method is None:
                    raise Refused(f"uses the pickle opcode {name}, which data does not need")
                method(self, arg)
        if stream.size() > last + 1:
            raise Refused("holds more after its first object; files of one object are read")
        if len(self.stack) != 1 or self.marks:
            raise ValueError("the stack is not empty at its end")
        return self.stack[0]

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("a value is missing")
        return self.stack[-1]

    def to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self, arg: Any) -> None:
        self.marks.append(len(self.stack))

    def discard(self, arg: Any) -> None:
        if self.marks and len(self.stack) == self.marks[-1]:
            self.marks.pop()
        else:
            self.pop()

    def discard_to_mark(self, arg: Any) -> None:
        self.to_mark()

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        if type(self.top()) is not list:
            raise ValueError("items for something that is no list")
        self.top().extend(items)

    def set_items(self, items: list[Any]) -> None:
        if type(self.top()) is not dict or len(items) % 2:
            raise ValueError("items for something that is no dictionary")
        self.top().update((checked_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def add_items(self, items: list[Any]) -> None:
        if type(self.top()) is not set:
            raise ValueError("items for something that is no set")
        self.top().update(checked_key(item) for item in items)

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def find(self, module: Any, name: Any) -> None:
        full = f"{text_of(module)}.{text_of(name)}"
        if full not in ADMITTED:
            raise Refused(f"asks for {full[:200]}; only numpy arrays and plain containers are read")
        self.stack.append(Global(full))

    def reduce(self, arg: Any) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is no function")
        self.stack.append(ADMITTED[function.name](*args))

    def build(self, arg: Any) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Array | Dtype):
            raise Refused(f"sets the state of a {type(target).__name__}, which data does not need")
        target.build(state)

    def pop_two(self) -> list[Any]:
        value, key = self.pop(), self.pop()
        return [key, value]

    def new_dict(self) -> None:
        items = self.to_mark()
        self.stack.append({})
        self.set_items(items)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda arg: value


def _same(arg: Any) -> Any:
    return arg


_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _same),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _same),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _same),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), lambda arg: OldString(arg.encode("latin-1"))),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_LIST": lambda arg: [],
    "EMPTY_TUPLE": lambda arg: (),
    "EMPTY_DICT": lambda arg: {},
    "EMPTY_SET": lambda arg: set(),
}

_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_to_mark,
    "DUP": lambda m, arg: m.stack.append(m.top()),
    "LIST": lambda m, arg: m.stack.append(m.to_mark()),
    "TUPLE": lambda m, arg: m.stack.append(tuple(m.to_mark())),
    "TUPLE1": lambda m, arg: m.tuple_of(1),
    "TUPLE2": lambda m, arg: m.tuple_of(2),
    "TUPLE3": lambda m, arg: m.tuple_of(3),
    "DICT": lambda m, arg: m.new_dict(),
    "FROZENSET": lambda m, arg: m.stack.append(frozenset(checked_key(item) for item in m.to_mark())),
    "APPEND": lambda m, arg: m.append([m.pop()]),
    "APPENDS": lambda m, arg: m.append(m.to_mark()),
    "SETITEM": lambda m, arg: m.set_items(m.pop_two()),
    "SETITEMS": lambda m, arg: m.set_items(m.to_mark()),
    "ADDITEMS": lambda m, arg: m.add_items(m.to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda m, arg: m.put(len(m.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, arg: m.stack.append(m.memo[arg])),
    "GLOBAL": lambda m, arg: m.find(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, arg: m.find(*m.pop_two()),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _resolve(root: Any) -> Any:
    """``root`` with arrays in place of what stood for them; objects that occur twice are shared, not repeated."""
    done: dict[int, Any] = {}
    open_: set[int] = set()

    def inner(value: Any, depth: int) -> Any:
        if isinstance(value, OldString):
            return value.text()
        if isinstance(value, Global | Dtype):
            raise ValueError("a type stands where data should be")
        if not isinstance(value, list | tuple | dict | set | frozenset | Array):
            return value
        if id(value) in done:
            return done[id(value)]
        if id(value) in open_ or depth > MAX_DEPTH:
            raise Refused(f"holds containers that hold themselves or nest deeper than {MAX_DEPTH}")
        open_.add(id(value))
        done[id(value)] = result = rebuilt(value, lambda item: inner(item, depth + 1))
        open_.remove(id(value))
        return result

    def rebuilt(value: Any, each: Callable[[Any], Any]) -> Any:
        if isinstance(value, Array):
            return value.resolved(each)
        if isinstance(value, dict):
            return {each(key): each(item) for key, item in value.items()}
        return type(value)(each(item) for item in value)

    return inner(root, 0)
