"""Names of the schedules in Triton, and the environment variable that chooses one of them."""

from __future__ import annotations

import os

# Fused kernels keep what a pair of rows needs in registers; the other schedule stores it by chunks for torch's matmuls.
SCHEDULES = ("fused", "stored")


def named_schedule() -> str | None:
    """MI_KERNELS_SCHEDULE, None where it is not set. Raises ValueError where it names no schedule."""
    named = os.environ.get("MI_KERNELS_SCHEDULE")
    if named and named not in SCHEDULES:
        raise ValueError(f"MI_KERNELS_SCHEDULE must be one of {', '.join(SCHEDULES)}, got {named!r}")
    return named or None
