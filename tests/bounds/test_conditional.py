"""Conditional InfoNCE and NCE-CLUB: negatives come from samples with the same label."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mi_kernels.bounds import NCECLUB, InfoNCE
from mi_kernels.critics import BilinearCritic, ConcatCritic, Critic, DotCritic, SeparableCritic

CRITICS: dict[str, Callable[[], Critic]] = {
    "dot": lambda: DotCritic(temperature=0.7),
    "bilinear": lambda: BilinearCritic(4, 4),
    "separable": lambda: SeparableCritic(4, 4, hidden_dims=(8,), embed_dim=3),
    "concat": lambda: ConcatCritic(4, 4, hidden_dims=(8, 6), memory_budget=1),
    "grouped": lambda: ConcatCritic(4, 4, hidden_dims=(8, 6), groups=3),
}
CASES = [(name, lead) for name in CRITICS for lead in ((), (3,)) if name != "grouped" or lead]


def draw(*lead: int, batch: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (torch.randn(*lead, batch, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x, y, torch.randint(-1, 4, (*lead, batch))


def conditional(scores: Tensor, labels: Tensor, anchor: str, upper: bool) -> Tensor:
    """The conditional bound from materialised scores [B, B], row by row."""
    if anchor == "y" and not upper:
        scores = scores.T
    terms = []
    for i, label in enumerate(labels.tolist()):
        row = scores[i, labels == label]
        terms.append(scores[i, i] - (row.mean() if upper else row.exp().mean().log()))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("anchor", ["x", "y"])
@pytest.mark.parametrize(("name", "lead"), CASES)
def test_negatives_come_from_the_samples_own_label(name: str, lead: tuple[int, ...], anchor: str) -> None:
    critic = CRITICS[name]().double()
    x, y, labels = draw(*lead)
    inputs = [x, y, *critic.parameters()]
    scores, flat = critic(x, y).reshape(-1, 12, 12), labels.reshape(-1, 12)
    lower, upper = (bound(critic, anchor=anchor, condition="group") for bound in (InfoNCE, NCECLUB))
    for got, sign, club in (
        (lower(x, y, labels), 1, False),
        (lower.learning_loss(x, y, labels), -1, False),
        (upper(x, y, labels.unsqueeze(-1)), 1, True),
        (upper.learning_loss(x, y, labels), -1, False),
    ):
        want = torch.stack([conditional(s, c, anchor, club) for s, c in zip(scores, flat, strict=True)]).reshape(lead)
        torch.testing.assert_close(got, sign * want)
        wants = torch.autograd.grad(want.sum(), inputs, retain_graph=True)
        for g, w in zip(torch.autograd.grad(got.sum(), inputs), wants, strict=True):
            torch.testing.assert_close(sign * g, w)


@pytest.mark.parametrize("bound", [InfoNCE, NCECLUB])
def test_one_label_is_no_condition_and_singletons_know_nothing(bound) -> None:
    module = bound(CRITICS["concat"]().double(), condition="group")
    x, y, labels = draw(2)
    torch.testing.assert_close(module(x, y, torch.zeros_like(labels)), module(x, y))
    alone = module(x, y, torch.arange(12).expand(2, 12))
    torch.testing.assert_close(alone, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert alone.requires_grad


def test_a_label_that_explains_the_dependence_leaves_none() -> None:
    """x and y share only their cluster C, so I(X; Y | C) = 0, while I(X; Y) = log 4."""
    values = []
    for _ in range(8):
        labels = torch.randint(0, 4, (256,))
        centers = 6 * torch.eye(4, dtype=torch.float64)
        x, y = (centers[labels] + 0.1 * torch.randn(256, 4, dtype=torch.float64) for _ in range(2))
        values.append([InfoNCE(DotCritic(6.0), condition="group")(x, y, c).item() for c in (labels, 0 * labels)])
    within, across = torch.tensor(values).mean(0).tolist()
    assert -0.05 < within < 0.01
    assert across == pytest.approx(math.log(4), abs=0.05)


@pytest.mark.parametrize("bound", [InfoNCE, NCECLUB])
def test_bad_conditions_are_named(bound) -> None:
    module = bound(DotCritic(), condition="group")
    x, y, labels = draw()
    for bad, message in [
        (labels.double(), "condition must hold integer labels"),
        (labels[:5], "condition must be"),
        (labels.expand(2, 12), "condition must be"),
    ]:
        for call in (module, module.learning_loss):
            with pytest.raises(ValueError, match=message):
                call(x, y, bad)
    with pytest.raises(ValueError, match="condition must be one of"):
        bound(DotCritic(), condition="kernel")
