"""Drop-in replacements: the names, signatures and results of the libraries in use, without a stored score matrix.

    from mi_kernels.compat.open_clip import ClipLoss        # was: from open_clip import ClipLoss

One module per library; each says where it differs from the original and why. Modules are imported when first used.
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
