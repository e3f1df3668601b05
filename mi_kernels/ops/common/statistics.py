"""The statistics of a score matrix that critics compute and bounds use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_choice

STATISTICS = ("positive", "row_lse", "col_lse", "row_sum", "row_softplus", "clipped_row_lse")
PAIRS = ("all", "off_diagonal")


class Statistics(NamedTuple):
    """Statistics of a score matrix; fields that were not requested are None."""

    positive: Tensor | None = None
    row_lse: Tensor | None = None
    col_lse: Tensor | None = None
    row_sum: Tensor | None = None
    row_softplus: Tensor | None = None
    clipped_row_lse: Tensor | None = None


def check_request(stats: Sequence[str], pairs: str, clip: float | None) -> None:
    """Raises ValueError for unknown names of statistics or pairs, and for a missing or invalid clip."""
    if not isinstance(stats, (list, tuple)) or not stats or any(s not in STATISTICS for s in stats):
        raise ValueError(f"stats must be a non-empty sequence out of {STATISTICS}, got {stats!r}")
    check_choice("pairs", pairs, PAIRS)
    if "clipped_row_lse" in stats and not (isinstance(clip, (int, float, torch.SymFloat)) and clip > 0):
        raise ValueError(f"clip must be a positive number if clipped_row_lse is requested, got {clip!r}")


def check_pairing(stats: Sequence[str], pairs: str, rows: int, columns: int) -> None:
    """Raises ValueError unless there are as many columns as rows, if row i is paired with column i."""
    if ("positive" in stats or pairs == "off_diagonal") and rows != columns:
        raise ValueError(
            f"y must have as many samples as x ({rows}) for positives or off-diagonal pairs, got {columns}"
        )
