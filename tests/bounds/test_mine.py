"""MINE's moving average: the gradient that it corrects, its state, and checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mi_kernels.bounds import MINE, DonskerVaradhan
from mi_kernels.critics import BilinearCritic, DotCritic
from tests.bounds.formulas import CRITICS, dv, mean_exp, off, pair


def mine_gradient(scores: Tensor, log_average: float) -> Tensor:
    """The gradient of E_P[T] - E_Q[exp T] / A with respect to the scores, A being the average."""
    b = scores.shape[-1]
    weights = (scores.detach() - log_average).exp() / (b * (b - 1))
    return torch.eye(b, dtype=scores.dtype) / b - weights.masked_fill(torch.eye(b, dtype=torch.bool), 0)


def test_mine_divides_by_a_moving_average() -> None:
    critic = CRITICS["dot"]()
    bound = MINE(critic, decay=0.9)
    average = None
    for _ in range(4):
        x, y = (t.requires_grad_() for t in pair())
        scores = critic(x, y)
        batch_mean = mean_exp(off(scores)).item()
        average = batch_mean if average is None else 0.9 * average + 0.1 * batch_mean
        value = bound(x, y)
        assert bound.log_average.item() == pytest.approx(math.log(average), abs=1e-12)
        torch.testing.assert_close(value, dv(scores))
        want = torch.autograd.grad(scores, [x, y], mine_gradient(scores, math.log(average)))
        for a, b in zip(torch.autograd.grad(value, [x, y]), want, strict=True):
            torch.testing.assert_close(a, b)


def test_mine_without_memory_and_in_evaluation_is_donsker_varadhan() -> None:
    critic, first, second = CRITICS["dot"](), pair(), [t.requires_grad_() for t in pair()]
    plain = torch.autograd.grad(DonskerVaradhan(critic)(*second), second)
    forgetful, evaluated = MINE(critic, decay=0.0), MINE(critic)
    for bound in (forgetful, evaluated):
        bound(*first)
    before = evaluated.log_average.clone()
    for bound in (forgetful, evaluated.eval()):
        for a, b in zip(torch.autograd.grad(bound(*second), second), plain, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(evaluated.log_average, before)


def test_an_outlier_at_most_doubles_the_moving_average_of_mine() -> None:
    bound = MINE(DotCritic(), decay=0.99)
    x, y = pair()
    bound(x, y)
    before = bound.log_average.item()
    large = [(100 * t).requires_grad_() for t in (x, y)]
    value = bound(*large)
    assert bound.log_average.item() == pytest.approx(before + math.log(1.99), abs=1e-9)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, large))


@pytest.mark.parametrize("lead", [(), (3,)])
def test_the_moving_average_of_mine_survives_a_checkpoint(lead: tuple[int, ...], tmp_path) -> None:
    bound = MINE(BilinearCritic(4, 4).double())
    for _ in range(3):
        bound(*pair(*lead))
    torch.save(bound.state_dict(), tmp_path / "bound.pt")
    resumed = MINE(BilinearCritic(4, 4).double())
    resumed.load_state_dict(torch.load(tmp_path / "bound.pt"))
    assert resumed.log_average.shape == lead
    x, y = (t.requires_grad_() for t in pair(*lead))
    for a, b in zip(*(torch.autograd.grad(m(x, y).sum(), [x, y]) for m in (bound, resumed)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(bound.log_average, resumed.log_average)


def test_a_batch_that_is_not_finite_leaves_the_moving_average_as_it_was() -> None:
    bound = MINE(DotCritic())
    x, y = pair()
    assert bound(x * math.nan, y).isnan()
    assert bound.log_average.isnan()
    bound(x, y)
    before = bound.log_average.clone()
    assert bound(x * math.nan, y).isnan()
    assert torch.equal(bound.log_average, before)


def test_other_groups_than_the_moving_average_has_are_refused() -> None:
    bound = MINE(DotCritic())
    bound(*pair(3))
    with pytest.raises(ValueError, match="group dimensions of the moving average"):
        bound(*pair(2))
