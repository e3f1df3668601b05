"""What a benchmark case is: leaves, contenders over them, the exact answer, and the work that a ratio counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
Answer = tuple[Tensor, list[Tensor]]
# Norm-wise, of the value and of the gradient of every leaf. Gradients of 16-bit leaves are rounded to 16 bits.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@dataclass
class Problem:
    leaves: list[Tensor]
    contenders: dict[str, Loss]
    exact: Callable[[], Answer]
    flop: float = 0.0  # what the convention counts for forward plus backward
    convention: str = ""
    moved_bytes: float = 0.0  # what has to be read and written at least
    slack: float = 1.0  # times the tolerance
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`make(device)` builds the problem; `seconds` is the budget of all contenders together."""

    group: str
    name: str
    size: dict[str, Any]
    make: partial[Problem]
    seconds: float = 8.0
    quick: bool = False  # also with --quick


def answer(loss: Loss, leaves: list[Tensor]) -> Answer:
    value = loss()
    return value.detach(), list(torch.autograd.grad(value, leaves))


def wrong(loss: Loss, problem: Problem, want: Answer) -> str | None:
    """Why `loss` does not compute what it should; None when it does."""
    value, gradients = answer(loss, problem.leaves)
    tolerance = problem.slack * max(TOLERANCE[t.dtype] for t in problem.leaves)
    if not abs(float(value) - float(want[0])) <= tolerance * max(abs(float(want[0])), 1e-3):
        return f"its value is {float(value):.6g}, exact is {float(want[0]):.6g}"
    norms = [float(t.double().norm()) for t in want[1]]
    for i, (got, exact, norm) in enumerate(zip(gradients, want[1], norms, strict=True)):
        # A gradient that cancels is measured by the largest one.
        error, allowed = float((got.double() - exact.double()).norm()), tolerance * (norm + 0.1 * max(norms))
        if not error <= allowed:
            return f"the gradient of leaf {i} errs by {error:.2e}, allowed is {allowed:.2e}"
    return None
