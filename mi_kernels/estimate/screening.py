"""Detects samples that would mislead an estimate: duplicated rows, serially correlated rows and extreme outliers.

The random split tests the fit only if rows are independent. A critic recognises a held-out row that is a copy of a
training row, and this looks like mutual information. The same holds for neighbouring rows of a slow time series.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .preprocessing import Preprocessing, RankNormal

LEAST_DISTINCT = 50
# A row with a larger share of the samples is a mass point (such as a sensor at its limit), not a duplicated row.
LARGEST_SHARE = 0.02
LARGEST_GAP = 100.0  # ratio of outliers to other values; that of 10,000 Cauchy samples exceeds it in 1 % of cases
OUTLIERS = 0.01  # largest share of the samples that may be outliers
SERIAL_COLUMNS = 32
LEAST_SERIAL = 0.05  # product of the correlations in x and in y at which the true interval is 5 % wider


class Copies(NamedTuple):
    kept: Tensor  # row numbers in order, one of every group of copies
    notes: list[str]


def _hash(v: Tensor) -> Tensor:
    """A 64-bit hash per row, [N], equal for equal rows. Integer sums wrap around, so the order of summation does not
    matter."""
    bits = (v + 0.0).view(torch.int64)  # -0.0 becomes 0.0
    draw = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (v.shape[1],), generator=draw).to(v.device) * 2 + 1
    return _mixed((_mixed(bits) * odd).sum(-1))


def _mixed(bits: Tensor) -> Tensor:
    """Mixes the high bits of a float's bit pattern into all bits."""
    bits = (bits ^ (bits >> 32)) * 0x45D9F3B3335B369
    bits = (bits ^ (bits >> 29)) * 0x3335B36945D9F3B
    return bits ^ (bits >> 32)


def _may_be_discrete(v: Tensor) -> bool:
    return v.shape[1] == 1 and bool((v == v.round()).all())


def without_copies(x: Tensor, y: Tensor) -> Copies:
    """Keeps one of every group of equal rows (x, y) if they look like copies; x [N, Dx], y [N, Dy].

    Rows of discrete variables repeat too. Equal rows count as copies only if x or y has non-integer values and
    distinguishes nearly all distinct rows. Mass points, and samples with fewer than 50 distinct rows, are left
    unchanged.
    """
    n = x.shape[0]
    everything = torch.arange(n, device=x.device)
    of_x, of_y = _hash(x), _hash(y)
    distinct, group, sizes = torch.unique(_mixed(of_x) + 3 * _mixed(of_y), return_inverse=True, return_counts=True)
    copied = (sizes > 1) & (sizes <= max(2, LARGEST_SHARE * n))
    told_apart = any(
        not _may_be_discrete(side) and hashes.unique().numel() >= 0.9 * distinct.numel()
        for side, hashes in ((x, of_x), (y, of_y))
    )
    if not copied.any() or not told_apart or distinct.numel() < LEAST_DISTINCT:
        return Copies(everything, [])
    first = torch.full_like(sizes, n).scatter_reduce(0, group, everything, "amin")
    kept = everything[~copied[group] | (first[group] == everything)]
    largest = int(torch.where(copied, sizes, 0).argmax())
    note = (
        f"copies: {n - kept.numel()} of {n} rows of x and y equal an earlier row (row {int(first[largest])} occurs "
        f"{int(sizes[largest])} times) and were left out: copies on both sides of the split look like dependence"
    )
    return Copies(kept, [note])


def outliers(name: str, fitted: Preprocessing, v: Tensor, rows: Tensor) -> list[str]:
    """Warns about a few samples that lie 100 times farther out than all others; v [N, D], `rows` its row numbers.

    Heavy-tailed distributions do not have such a gap. The critics use ranks, which limits the effect of an outlier, but
    it may come from a wrong unit or a placeholder value.
    """
    most = max(1, int(OUTLIERS * v.shape[0]))
    sizes, order = fitted.distance(v).topk(min(most + 1, v.shape[0]), dim=0)  # [most + 1, D]
    far = sizes[:-1] >= LARGEST_GAP * sizes[1:].clamp(min=1.0)
    if not far.any():
        return []
    last, column = (int(i) for i in far.nonzero()[-1])
    named = rows[order[: min(last + 1, 3), column]].tolist()
    where = f"row{'s' if last else ''} {', '.join(map(str, named))}{', ...' if last >= 3 else ''}"
    near, distant = float(sizes[last + 1, column]), float(sizes[last, column])
    return [
        f"outliers: {where} of {name} {'lie' if last else 'lies'} {distant:.0e} spreads or more from the median of "
        f"column {column}, every other row at most {near:.0e}"
    ]


def _serial(v: Tensor) -> float:
    """The largest correlation, over at most 32 columns, between the ranks of consecutive rows."""
    step = -(-v.shape[1] // SERIAL_COLUMNS)
    ranks = v[:, ::step]
    normal = RankNormal(ranks)(ranks)
    normal = (normal - normal.mean(0)) / normal.std(0).clamp_min(1e-12)
    return float((normal[1:] * normal[:-1]).mean(0).abs().max())


def follows(x: Tensor, y: Tensor) -> list[str]:
    """Warns if neighbouring rows are correlated both in x and in y; x [N, Dx], y [N, Dy] in the given order.

    Serial correlation in only one of them does no harm: if the rows of x are independent, sums of products of x and y
    have the same variance as for independent rows.
    """
    of_x, of_y = _serial(x), _serial(y)
    if min(of_x, of_y) <= 5 / x.shape[0] ** 0.5 or of_x * of_y <= LEAST_SERIAL:
        return []
    return [
        f"serial: neighbouring rows are correlated, by {of_x:.2f} in x and {of_y:.2f} in y. In a time series the value "
        "may then be far too high and the interval too narrow: use rows that are far apart. If the rows were only "
        "sorted, ignore this warning"
    ]
