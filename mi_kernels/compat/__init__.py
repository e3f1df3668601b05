"""Drop-in replacements for contrastive-loss libraries: same names, signatures and results, without a stored score
matrix.

    from mi_kernels.compat.open_clip import ClipLoss        # was: from open_clip import ClipLoss

There is one module per library. Its docstring lists every difference from the original. Modules are imported on first
use.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = [
    "club",
    "factorcl",
    "info_nce",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "smile",
    "supcontrast",
    "torch_nn",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
