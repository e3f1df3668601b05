"""torch.compile of old torch versions, whose tracer cannot follow this package."""

from __future__ import annotations

import torch

from ...backends import release

# The oldest torch whose compiler traced the whole package in our tests. Versions 2.6 and 2.8 fail with an internal
# error on methods and slices of named tuples, which ends the user's program.
TRACEABLE = (2, 11)


def traceable(version: str) -> bool:
    """Whether torch.compile of this torch version can trace mi_kernels; a version without numbers is taken for new."""
    found = release(version)
    return not found or found >= TRACEABLE


def keep_out_of_compiled_graphs() -> None:
    """From now on torch.compile breaks its graph at functions of mi_kernels and runs them as they are."""
    from torch._dynamo import trace_rules

    trace_rules.add("mi_kernels")


def prepare() -> None:
    """Called once when the package is imported. On an old torch it imports torch's compiler, which takes seconds."""
    if not traceable(torch.__version__):
        keep_out_of_compiled_graphs()
