"""The registry of bounds. A decorator on its class registers a bound, and all other code reads the registry.

    @declare("nwj", kind="lower", value="E_P[T] - E_Q[exp(T - 1)]", negatives="off the diagonal")
    class NWJ(CriticBound): ...

Importing `mi_kernels.bounds` imports every module of that folder, so a declaration in a new file is enough for
`estimate_mi(estimator="nwj")`, `python -m mi_kernels estimate --estimator nwj`, the tests in
tests/bounds/test_registry.py, bench/staircase.py and the table in docs/bounds.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import nn

KINDS = ("lower", "upper", "neither")
# Critics of a pair (x, y): an inner product of features, or a network on the concatenated pair. The other kinds are a
# network on the concatenated rows of all modalities ("joint") and the bound's own density q(y | x) ("density").
PAIR_CRITICS = ("inner product", "concat")
CRITICS = (*PAIR_CRITICS, "joint", "density")
MUTUAL_INFORMATION = "mutual information"

Bound = TypeVar("Bound", bound=type[nn.Module])


class Ceiling(NamedTuple):
    """The largest possible value with n candidates, in nats: as text for tables and as a function of n."""

    formula: str
    of: Callable[[int], float]


@dataclass(frozen=True)
class Declaration:
    """The registry entry of a bound.

    name: its name in `estimate_mi` and on the command line.
    kind: "lower" (below `quantity` for every critic), "upper" (above it for the optimal critic) or "neither".
    value: its formula, for tables.
    ceiling: the largest value with n candidates, or None if there is no limit.
    trained_by: the name of the bound whose `learning_loss` it shares.
    estimator: builds the objective that `estimate_mi` fits, if that is not the bound with its defaults.
    """

    name: str
    bound: type[nn.Module]
    kind: str
    value: str
    negatives: str
    ceiling: Ceiling | None
    critics: tuple[str, ...]
    quantity: str
    trained_by: str
    estimator: Callable[[Any], nn.Module]

    @property
    def estimates(self) -> bool:
        """Whether `estimate_mi` accepts it: it scores pairs, and its value is mutual information in nats."""
        return self.quantity == MUTUAL_INFORMATION and set(self.critics) <= set(PAIR_CRITICS)

    def highest(self, candidates: int) -> float:
        """The largest possible value with a batch of `candidates` samples; infinite without a ceiling."""
        return math.inf if self.ceiling is None else self.ceiling.of(candidates)


_declared: dict[str, Declaration] = {}


def declare(
    name: str,
    *,
    kind: str,
    value: str,
    negatives: str,
    ceiling: Ceiling | None = None,
    critics: tuple[str, ...] = PAIR_CRITICS,
    quantity: str = MUTUAL_INFORMATION,
    trained_by: str | None = None,
    estimator: Callable[[Any], nn.Module] | None = None,
) -> Callable[[Bound], Bound]:
    """Class decorator that registers a bound; `Declaration` describes the arguments.

    Raises ValueError for a name that another class uses, an unknown kind or an unknown critic.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not critics or not set(critics) <= set(CRITICS):
        raise ValueError(f"critics must be a tuple of {', '.join(CRITICS)}, got {critics!r}")

    def enter(bound: Bound) -> Bound:
        known = _declared.get(name)
        if known is not None and known.bound.__qualname__ != bound.__qualname__:
            raise ValueError(f"name must be new: {name!r} is the name of {known.bound.__qualname__}")
        _declared[name] = Declaration(
            name, bound, kind, value, negatives, ceiling, critics, quantity, trained_by or name, estimator or bound
        )
        return bound

    return enter


def declarations() -> tuple[Declaration, ...]:
    """All declarations, sorted by name."""
    return tuple(_declared[name] for name in sorted(_declared))


def estimators() -> tuple[str, ...]:
    """Names that `estimate_mi` accepts, the default first."""
    return tuple(sorted((d.name for d in declarations() if d.estimates), key=lambda name: (name != "infonce", name)))


def find(name: str) -> Declaration:
    """The declaration of the bound with this name. Raises ValueError for unknown names."""
    if not isinstance(name, str) or name not in _declared:
        raise ValueError(f"name must be one of {', '.join(sorted(_declared))}, got {name!r}")
    return _declared[name]


def table() -> list[str]:
    """The lines of a Markdown table of all bounds."""
    lines = ["| name | class | kind | value | negatives | at most, of n candidates | critics |", "|" + "---|" * 7]
    for d in declarations():
        kind = d.kind if d.quantity == MUTUAL_INFORMATION else f"{d.kind}, of {d.quantity}"
        ceiling = "-" if d.ceiling is None else d.ceiling.formula
        cells = [f"`{d.name}`", f"`{d.bound.__name__}`", kind, d.value, d.negatives, ceiling, ", ".join(d.critics)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
