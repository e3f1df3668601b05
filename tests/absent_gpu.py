"""Runs the GPU code path without a GPU: torch's meta device stands in for it, and Triton kernels are not executed.

Meta tensors have no data. So anything that reads values on the host and would synchronise with a GPU (`.item()`,
`bool(tensor)`, a shape that depends on values) raises an error. Gradients work.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from unittest import mock

import torch

import mi_kernels.ops

DEVICE = torch.device("meta")


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A meta tensor; a leaf that requires gradients if its dtype is floating-point."""
    return torch.empty(shape, device=DEVICE, dtype=dtype).requires_grad_(dtype.is_floating_point)


def _kernel_modules() -> list:
    names = [m.name for m in pkgutil.walk_packages(mi_kernels.ops.__path__, "mi_kernels.ops.")]
    found = [importlib.import_module(n) for n in names if n.rsplit(".", 1)[-1].startswith("triton")]
    return [m for m in found if hasattr(m, "INTERPRETED")]


@contextlib.contextmanager
def absent_gpu() -> Iterator[list[str]]:
    """Yields the list of launched kernels' names. Launchers are patched to accept tensors without data, as if the
    interpreter ran."""
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    with contextlib.ExitStack() as stack:
        for module in _kernel_modules():
            stack.enter_context(mock.patch.object(module, "INTERPRETED", True))
        stack.enter_context(mock.patch("mi_kernels.backends._interpreting", lambda: True))
        # Autocast does not support the meta device.
        stack.enter_context(mock.patch("torch.is_autocast_enabled", lambda *device: False))
        run = lambda self, *args, **kwargs: launched.append(self.fn.__name__)  # noqa: E731
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield launched
