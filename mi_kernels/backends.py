"""Chooses the backend of an operator and reports why a backend is not available.

There are five backends:
* `reference`: plain torch that materialises the scores; it defines the result.
* `chunked`: plain torch in chunks of rows, O(B) memory, always available.
* `cpu`: the compiled C++ extension.
* `triton`: Triton kernels, on GPUs or in Triton's interpreter.
* `cuda`: the extension's CUDA C++ kernels. They run on request, and by default for operators without a Triton kernel
  and for attention with narrow heads.

By default the device of the inputs decides. A backend that the caller names either runs or raises an error.
"""

from __future__ import annotations

import functools
import glob
import importlib
import importlib.util
import os
import re
import threading
import warnings
from pathlib import Path
from types import TracebackType

import torch

NAMES = ("reference", "chunked", "cpu", "triton", "cuda")
CUDA_OPS = ("dot_critic", "mlp_critic", "cross_attention", "lstm_scan")  # operators that have CUDA C++ kernels
TRITON_OLDEST = (3, 6)  # pyproject.toml says the same; Triton 3.5 spills registers, 3.4 refuses products of fp64 tiles
CUDA_SHARED_BYTES = 163 * 1024  # kSharedLimit in csrc/common/cuda/primitives.cuh
_local = threading.local()
# CPython's dictionary behind os.environ. Looking up an absent name in os.environ raises and catches a KeyError, which
# costs 1 % of the time of a small loss.
_environ = getattr(os.environ, "_data", None)
_encoded = os.environ.encodekey("MI_KERNELS_BACKEND") if _environ is not None else None
_process_default: str | None = None
_warned = False


@functools.cache
def extension_status() -> str:
    """Loads the compiled extension once; returns "available" or the reason why it is not."""
    if os.environ.get("MI_KERNELS_DISABLE_EXTENSION", "0") not in ("", "0"):
        return "disabled by MI_KERNELS_DISABLE_EXTENSION"
    found = glob.glob(str(Path(__file__).parent / "_C*.so"))
    if not found:
        return "the compiled extension was not built (a C++ compiler is needed when the package is installed)"
    try:
        torch.ops.load_library(found[0])
    except (OSError, RuntimeError) as error:
        return f"the compiled extension does not load: {str(error).splitlines()[0]}"
    return "available"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton_status() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not _interpreting():
        return "no CUDA device is present and TRITON_INTERPRET is not set"
    return _triton_version_status()


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 11) of "2.11.0+cu130"; empty for a version without numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@functools.cache
def _triton_version() -> str:
    return str(importlib.import_module("triton").__version__)


def _triton_version_status() -> str:
    try:
        version = _triton_version()
    except Exception as error:  # a damaged installation can raise any exception
        return f"triton does not import: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if release(version) < TRITON_OLDEST:
        wanted = ".".join(map(str, TRITON_OLDEST))
        return f"triton {version} is installed, the kernels need {wanted} or newer (torch 2.11 brings it)"
    return "available"


def _cuda_status() -> str:
    status = extension_status()
    if status != "available":
        return status
    if not hasattr(torch.ops.mi_kernels_cuda, "dot_critic_stats"):
        return "the compiled extension was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is present"
    properties = torch.cuda.get_device_properties()
    shared = getattr(properties, "shared_memory_per_block_optin", CUDA_SHARED_BYTES)
    if properties.major < 8 or shared < CUDA_SHARED_BYTES:
        return (
            f"the kernels need compute capability 8.0 and {CUDA_SHARED_BYTES} bytes of shared memory a block, "
            f"{properties.name} has {properties.major}.{properties.minor} and {shared}"
        )
    return "available"


def _status(name: str) -> str:
    if name == "cpu":
        return extension_status()
    if name == "cuda":
        return _cuda_status()
    return _triton_status() if name == "triton" else "available"


def backends() -> dict[str, str]:
    """Maps the name of every backend to "available", or to the reason why it cannot run here."""
    return {name: _status(name) for name in NAMES}


def usable(name: str) -> bool:
    """Whether a backend can run here."""
    return _status(name) == "available"


def _check(name: str | None, argument: str) -> None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)} or None, got {name!r}")


class use_backend:
    """Sets the default backend.

    `use_backend("reference")` sets it for the whole process. `with use_backend("reference"):` sets it for the current
    thread and restores it when the block ends. None means the automatic choice. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str | None):
        global _process_default
        _check(name, "name")
        self._name = name
        self._before = _process_default
        _process_default = name

    def __enter__(self) -> use_backend:
        global _process_default
        _process_default = self._before
        self._stack().append(self._name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack().pop()

    @staticmethod
    def _stack() -> list[str | None]:
        if not hasattr(_local, "stack"):
            _local.stack = []
        return _local.stack


def requested_backend() -> str | None:
    """The backend for calls that name none: from the innermost `with` block, else the process, else the environment."""
    stack = getattr(_local, "stack", None)
    if stack:
        return stack[-1]
    if _process_default is not None:
        return _process_default
    if _environ is not None and _encoded not in _environ:
        return None
    name = os.environ.get("MI_KERNELS_BACKEND") or None
    _check(name, "MI_KERNELS_BACKEND")
    return name


def resolve(op: str, device: torch.device, requested: str | None = None) -> str:
    """Returns the backend that runs `op` on `device`.

    If the caller, `use_backend` or MI_KERNELS_BACKEND names a backend that cannot run, this raises RuntimeError with
    the reason. Without a named backend, `chunked` replaces a missing extension, with one warning per process.
    """
    global _warned
    _check(requested, "backend")
    name = requested or requested_backend()
    if name is not None:
        status = _status(name)
        if status != "available":
            raise RuntimeError(f"backend {name!r} was requested but cannot run {op}: {status}")
        if name == "cpu" and device.type != "cpu":
            raise RuntimeError(f"backend 'cpu' was requested, but the inputs of {op} are on {device}")
        if device.type != "cuda" and (name == "cuda" or (name == "triton" and not _interpreting())):
            raise RuntimeError(f"backend {name!r} was requested, but the inputs of {op} are on {device}")
        if name == "cuda" and op not in CUDA_OPS:
            raise RuntimeError(f"backend 'cuda' was requested but cannot run {op}: it has no CUDA C++ kernel")
        return name
    best = {"cuda": "triton", "cpu": "cpu"}.get(device.type)
    if best is None:
        return "chunked"
    status = _status(best)
    if status == "available":
        return best
    if not _warned:
        _warned = True
        warnings.warn(f"mi_kernels runs in plain torch: {status}", RuntimeWarning, stacklevel=3)
    return "chunked"
