"""What ``safe_pickle`` makes of the globals that data mentions: arrays, dtypes, containers, built by our code alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_DTYPE = re.compile(r"([<>=|]?)(b1|[iu][1248]|f[248]|f16|c8|c16|O[48]?|[SU][1-9][0-9]{0,8})")
_SCALARS = (str, bytes, int, float, bool, type(None))


class Refused(Exception):
    """The rest of a sentence that starts with the file's name; what it quotes of the file has no control characters."""

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else "?" for c in super().__str__())


class Global:
    """A name that the file mentions: numpy's ndarray, or a callable of ``ADMITTED``."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class OldString(bytes):
    """A Python 2 ``str``: the bytes of an array, or text."""

    def text(self) -> str:
        try:
            return self.decode("utf-8")
        except UnicodeDecodeError:
            return self.decode("latin-1")


class Dtype:
    """A numpy dtype while it is being read: its spelling, then (BUILD) its byte order."""

    __slots__ = ("order", "spec")

    def __init__(self, *args: Any):
        spec = text_of(args[0]) if args else None
        match = _DTYPE.fullmatch(spec) if isinstance(spec, str) else None
        if match is None:
            raise Refused(f"holds an array of dtype {str(spec)[:40]!r}; numbers, booleans and strings are read")
        self.order, self.spec = match.groups()

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5:
            raise ValueError("a dtype has a malformed state")
        if any(part is not None for part in state[2:5]):
            raise Refused("holds a structured array; arrays of one number type are read")
        order = text_of(state[1])
        if order not in ("<", ">", "|", "="):
            raise ValueError("a dtype has an unknown byte order")
        self.order = order

    def native(self) -> np.dtype:
        order = self.order if self.order in "<>" and self.order else "="
        return np.dtype(order + self.spec if self.spec[0] != "O" else "O")


class Array:
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
        if not isinstance(dtype, Dtype):
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


def text_of(value: Any) -> Any:
    return value.text() if isinstance(value, OldString) else value


def _reconstruct(*args: Any) -> Array:
    if not args or not isinstance(args[0], Global) or args[0].name != "numpy.ndarray":
        kind = args[0].name if args and isinstance(args[0], Global) else "something"
        raise Refused(f"asks for an array of type {kind}; plain numpy arrays are read")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.fill(data, dtype, shape, str(text_of(order)))
    return array


def _scalar(dtype: Any, data: Any = None) -> Any:
    array = Array()
    array.fill(data, dtype, (1,), "C")
    if array.value is None or array.items is not None:
        raise ValueError("a scalar holds an object")
    return array.value[0].item()


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or text_of(encoding) not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise ValueError("a byte string is malformed")
    return text.encode(text_of(encoding))


def _bytes(content: Any = b"", encoding: Any = None) -> bytes:
    if isinstance(content, str):
        return _encoded(content, encoding)
    if not isinstance(content, bytes | bytearray | list | tuple):
        raise ValueError("a byte string is malformed")
    return bytes(content)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise ValueError("a set is malformed")
    return {checked_key(item) for item in items}


def _mapping(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
        raise ValueError("a dictionary is malformed")
    return {checked_key(key): value for key, value in items}


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
    "numpy.dtype": Dtype,
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default_mapping,
    **{f"numpy.{core}.multiarray.{name}": f for core in ("core", "_core") for name, f in _NUMPY.items()},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    **{f"{module}.{name}": f for module in ("builtins", "__builtin__") for name, f in _BUILTIN.items()},
}


def checked_key(key: Any) -> Any:
    """A dictionary key or set member. Deeper tuples are refused: their hash can take exponential time."""
    flat = isinstance(key, tuple) and len(key) <= 16 and all(isinstance(part, _SCALARS) for part in key)
    if not flat and not isinstance(key, _SCALARS):
        raise Refused(
            f"uses a {type(key).__name__.strip('_').lower()} as a dictionary key; strings and numbers are read"
        )
    return key
