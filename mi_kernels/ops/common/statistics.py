"""The statistics of a score matrix that critics compute and bounds read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_choice

STATISTICS = ("positive", "row_lse", "col_lse", "row_sum", "row_softplus", "clipped_row_lse")
PAIRS = ("all", "off_diagonal")


class Statistics(NamedTuple):
    """What a bound reads of a score matrix; a field is None when it was not asked for."""

    positive: Tensor | None = None
    row_lse: Tensor | None = None
    col_lse: Tensor | None = None
    row_sum: Tensor | None = None
    row_softplus: Tensor | None = None
    clipped_row_lse: Tensor | None = None


def check_request(stats: Sequence[str], pairs: str, clip: float | None) -> None:
    """Names of statistics and pairs that exist, and a clip where one is needed; ValueError otherwise."""
    if not isinstance(stats, list | tuple) or not stats or any(s not in STATISTICS for s in stats):
        raise ValueError(f"stats must be a non-empty sequence out of {STATISTICS}, got {stats!r}")
    check_choice("pairs", pairs, PAIRS)
    if "clipped_row_lse" in stats and not (isinstance(clip, int | float | torch.SymFloat) and clip > 0):
        raise ValueError(f"clip must be a positive number where clipped_row_lse is wanted, got {clip!r}")


def check_pairing(stats: Sequence[str], pairs: str, rows: int, columns: int) -> None:
    """As many columns as rows where row i belongs to column i; ValueError otherwise."""
    if ("positive" in stats or pairs == "off_diagonal") and rows != columns:
        raise ValueError(
            f"y must have as many samples as x ({rows}) for positives or off-diagonal pairs, got {columns}"
        )
