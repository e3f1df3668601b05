"""Reads pickles that hold numpy arrays and plain containers, and nothing else; nothing in the file is ever called.

``pickle.load`` runs whatever a file asks for, so it is not used. ``pickletools.genops`` takes the file apart into
opcodes, and the small machine below gives them the meaning that data needs: numbers, strings, lists, tuples,
dictionaries, sets and arrays. Globals are looked up in one table (``ADMITTED``); any other is refused by its name.
Arrays are built from their bytes with ``np.frombuffer`` after dtype, shape and size have been compared, never by
numpy's own ``__setstate__``. Python 2 pickles (protocols 0 to 2, ``numpy.core``, byte strings) read like those of
Python 3.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

MAX_DEPTH = 64
_DTYPE = re.compile(r"([<>=|]?)(b1|[iu][1248]|f[248]|f16|c8|c16|O[48]?|[SU][1-9][0-9]{0,8})")
_SCALARS = (str, bytes, int, float, bool, type(None))


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
        except _Refused as error:
            raise ValueError(f"{path} {error}") from None
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"{path} is not a complete pickle: {reason}") from error


class _Refused(Exception):
    """The rest of a sentence that starts with the file's name."""


class _Global:
    """A name that the file mentions: numpy's ndarray, or a callable of ``ADMITTED``."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Old(bytes):
    """A Python 2 ``str``: the bytes of an array, or text."""

    def text(self) -> str:
        try:
            return self.decode("utf-8")
        except UnicodeDecodeError:
            return self.decode("latin-1")


class _Dtype:
    """A numpy dtype while it is being read: its spelling, then (BUILD) its byte order."""

    __slots__ = ("order", "spec")

    def __init__(self, *args: Any):
        spec = _text(args[0]) if args else None
        match = _DTYPE.fullmatch(spec) if isinstance(spec, str) else None
        if match is None:
            raise _Refused(f"holds an array of dtype {str(spec)[:40]!r}; numbers, booleans and strings are read")
        self.order, self.spec = match.groups()

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5:
            raise ValueError("a dtype has a malformed state")
        if any(part is not None for part in state[2:5]):
            raise _Refused("holds a structured array; arrays of one number type are read")
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise ValueError("a dtype has an unknown byte order")
        self.order = order

    def native(self) -> np.dtype:
        order = self.order if self.order in "<>" and self.order else "="
        return np.dtype(order + self.spec if self.spec[0] != "O" else "O")


class _Array:
    """An array while it is being read; ``value`` is set by BUILD."""

    __slots__ = ("flat", "items", "value")

    def __init__(self) -> None:
        self.value: np.ndarray | None = None
        self.items: list[Any] | None = None  # of an array of objects, in the order of ``flat``
        self.flat = np.empty(0, object)

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError("an array has a malformed state")
        shape, dtype, fortran, data = state[-4:]
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: str) -> None:
        shape = _shape(shape)
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array has no dtype")
        kind = dtype.native()
        if kind.hasobject:
            if not isinstance(data, list) or len(data) != math.prod(shape):
                raise ValueError(f"an array of shape {shape} does not hold as many objects")
            self.items, self.flat = data, np.empty(len(data), object)
            self.value = self.flat.reshape(shape, order="F" if order == "F" else "C")
            return
        if not isinstance(data, bytes | bytearray):
            raise ValueError("an array has no bytes")
        if len(data) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} and dtype {kind} has {len(data)} bytes")
        self.value = _values(data, kind).reshape(shape, order="F" if order == "F" else "C")

    def resolved(self, inner: Callable[[Any], Any]) -> np.ndarray:
        if self.value is None:
            raise ValueError("an array has no content")
        if self.items is not None:
            for i, item in enumerate(self.items):
                self.flat[i] = inner(item)
            self.items = None
        return self.value


def _values(data: bytes | bytearray, dtype: np.dtype) -> np.ndarray:
    """Numbers [n] in this machine's byte order, sharing the memory of ``data`` where it has that order."""
    if dtype.kind == "b":
        return np.frombuffer(data, np.uint8) != 0
    values = np.frombuffer(data, dtype)
    values = values.astype(dtype.newbyteorder("="), copy=False)
    if dtype.kind == "U" and values.size and values.view(np.uint32).max() > 0x10FFFF:
        raise ValueError("a string array holds characters that do not exist")
    return values


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or len(shape) > 32:
        raise ValueError("an array has a malformed shape")
    if any(type(size) is not int or not 0 <= size < 2**40 for size in shape):
        raise ValueError("an array has a malformed shape")
    return shape


def _text(value: Any) -> Any:
    return value.text() if isinstance(value, _Old) else value


def _reconstruct(*args: Any) -> _Array:
    if not args or not isinstance(args[0], _Global) or args[0].name != "numpy.ndarray":
        kind = args[0].name if args and isinstance(args[0], _Global) else "something"
        raise _Refused(f"asks for an array of type {kind}; plain numpy arrays are read")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, str(_text(order)))
    return array


def _scalar(dtype: Any, data: Any = None) -> Any:
    array = _Array()
    array.fill(data, dtype, (1,), "C")
    if array.value is None or array.items is not None:
        raise ValueError("a scalar holds an object")
    return array.value[0].item()


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise ValueError("a byte string is malformed")
    return text.encode(_text(encoding))


def _bytes(content: Any = b"", encoding: Any = None) -> bytes:
    if isinstance(content, str):
        return _encoded(content, encoding)
    if not isinstance(content, bytes | bytearray | list | tuple):
        raise ValueError("a byte string is malformed")
    return bytes(content)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise ValueError("a set is malformed")
    return {_key(item) for item in items}


def _mapping(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
        raise ValueError("a dictionary is malformed")
    return {_key(key): value for key, value in items}


def _default_mapping(*factory: Any) -> dict[Any, Any]:
    return {}


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def _never(*args: Any) -> Any:
    raise ValueError("a type is used as if it were data")


_NUMPY: dict[str, Callable[..., Any]] = {"_reconstruct": _reconstruct, "scalar": _scalar}
_BUILTIN: dict[str, Callable[..., Any]] = {
    "set": _set,
    "frozenset": lambda items=(): frozenset(_set(items)),
    "bytes": _bytes,
    "bytearray": _bytes,
    "complex": _complex,
    # Mentioned as the factory of a defaultdict.
    **dict.fromkeys(("list", "dict", "tuple", "int", "float", "str"), _never),
}
ADMITTED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _never,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default_mapping,
    **{f"numpy.{core}.multiarray.{name}": f for core in ("core", "_core") for name, f in _NUMPY.items()},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    **{f"{module}.{name}": f for module in ("builtins", "__builtin__") for name, f in _BUILTIN.items()},
}


def _key(key: Any) -> Any:
    """A dictionary key or set member. Deeper tuples are refused: their hash can take exponential time."""
    flat = isinstance(key, tuple) and len(key) <= 16 and all(isinstance(part, _SCALARS) for part in key)
    if not flat and not isinstance(key, _SCALARS):
        raise _Refused(
            f"uses a {type(key).__name__.strip('_').lower()} as a dictionary key; strings and numbers are read"
        )
    return key


class _Machine:
    """The stack, the marks and the memo of a pickle; one method or entry of ``_PUSH`` for each group of opcodes."""

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
                    raise _Refused(f"uses the pickle opcode {name}, which data does not need")
                method(self, arg)
        if stream.size() > last + 1:
            raise _Refused("holds more after its first object; files of one object are read")
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
        self.top().update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def add_items(self, items: list[Any]) -> None:
        if type(self.top()) is not set:
            raise ValueError("items for something that is no set")
        self.top().update(_key(item) for item in items)

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def find(self, module: Any, name: Any) -> None:
        full = f"{_text(module)}.{_text(name)}"
        if full not in ADMITTED:
            raise _Refused(f"asks for {full[:200]}; only numpy arrays and plain containers are read")
        self.stack.append(_Global(full))

    def reduce(self, arg: Any) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is no function")
        self.stack.append(ADMITTED[function.name](*args))

    def build(self, arg: Any) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, _Array | _Dtype):
            raise _Refused(f"sets the state of a {type(target).__name__}, which data does not need")
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
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), lambda arg: _Old(arg.encode("latin-1"))),
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
    "FROZENSET": lambda m, arg: m.stack.append(frozenset(_key(item) for item in m.to_mark())),
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
        if isinstance(value, _Old):
            return value.text()
        if isinstance(value, _Global | _Dtype):
            raise ValueError("a type stands where data should be")
        if not isinstance(value, list | tuple | dict | set | frozenset | _Array):
            return value
        if id(value) in done:
            return done[id(value)]
        if id(value) in open_ or depth > MAX_DEPTH:
            raise _Refused(f"holds containers that hold themselves or nest deeper than {MAX_DEPTH}")
        open_.add(id(value))
        done[id(value)] = result = rebuilt(value, lambda item: inner(item, depth + 1))
        open_.remove(id(value))
        return result

    def rebuilt(value: Any, each: Callable[[Any], Any]) -> Any:
        if isinstance(value, _Array):
            return value.resolved(each)
        if isinstance(value, dict):
            return {each(key): each(item) for key, item in value.items()}
        return type(value)(each(item) for item in value)

    return inner(root, 0)
