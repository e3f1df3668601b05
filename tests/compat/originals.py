"""Helpers that compare the drop-ins with the original libraries, if these are installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def original(module: str, *hollow: str) -> ModuleType:
    """Imports a module of the original library; skips the test if it is not installed. Parent packages named in
    `hollow` are replaced by empty packages, so that their own imports (image libraries) are not needed."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{module} is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in hollow:
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            package.__spec__ = ModuleSpec(name, None, is_package=True)
            package.__spec__.submodule_search_locations = package.__path__
            sys.modules[name] = package
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        pytest.skip(f"{module} cannot be imported: {reason}")


def draw(*shape: int, seed: int = 0, unit: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = t / t.norm(dim=-1, keepdim=True) if unit else t
    return t.to(dtype).requires_grad_()


def same(got: Tensor, want: Tensor, inputs: Sequence[Tensor], rtol: float = 1e-8, atol: float = 1e-10) -> None:
    """Asserts that two values and their gradients with respect to every input are close."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, check_dtype=False)
    found = torch.autograd.grad(got, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(want, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


def parameters(function: Callable[..., Any]) -> list[str]:
    """Every parameter except self as 'name' or 'name=default'; keyword arguments as '**name'."""
    shown = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            shown.append(f"**{p.name}")
        elif p.name != "self":
            shown.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return shown


def largest_saved(loss: Callable[[], Tensor]) -> int:
    """Number of elements of the largest tensor that autograd saves for the backward."""
    sizes = [0]

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.untyped_storage().nbytes() // max(1, t.element_size()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    return max(sizes)
