"""The names of the Triton schedules, and the environment variable that selects one."""

from __future__ import annotations

import os

# Fused kernels keep the intermediate values of a pair of rows in registers; "stored" writes them in chunks for torch's
# matmuls.
SCHEDULES = ("fused", "stored")


def named_schedule() -> str | None:
    """The value of MI_KERNELS_SCHEDULE, or None if it is not set. Raises ValueError if it is not a schedule."""
    named = os.environ.get("MI_KERNELS_SCHEDULE")
    if named and named not in SCHEDULES:
        raise ValueError(f"MI_KERNELS_SCHEDULE must be one of {', '.join(SCHEDULES)}, got {named!r}")
    return named or None
