"""Programs on a GPU that is not there: torch's meta device stands for it, and Triton's kernels do not run.

A tensor there has no data, so a read on the host (`.item()`, `bool(tensor)`, a shape that depends on values), which
would make a GPU wait, raises. Gradients work.
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
    """Without values; a leaf that gradients are asked for if it is of floats."""
    return torch.empty(shape, device=DEVICE, dtype=dtype).requires_grad_(dtype.is_floating_point)


def _kernel_modules() -> list:
    names = [m.name for m in pkgutil.walk_packages(mi_kernels.ops.__path__, "mi_kernels.ops.")]
    found = [importlib.import_module(n) for n in names if n.rsplit(".", 1)[-1].startswith("triton")]
    return [m for m in found if hasattr(m, "INTERPRETED")]


@contextlib.contextmanager
def absent_gpu() -> Iterator[list[str]]:
    """Names of the kernels that were launched. Launchers take tensors without data for what the interpreter takes."""
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    with contextlib.ExitStack() as stack:
        for module in _kernel_modules():
            stack.enter_context(mock.patch.object(module, "INTERPRETED", True))
        stack.enter_context(mock.patch("mi_kernels.backends._interpreting", lambda: True))
        # Autocast has no such device.
        stack.enter_context(mock.patch("torch.is_autocast_enabled", lambda *device: False))
        run = lambda self, *args, **kwargs: launched.append(self.fn.__name__)  # noqa: E731
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield launched
