"""Every bound in the registry behaves as it declares. New bounds are covered without a change to this file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.bounds import registry
from mi_kernels.critics import ConcatCritic, Critic, SeparableCritic

ROOT = Path(__file__).resolve().parents[2]
PAIRED = [d for d in registry.declarations() if set(d.critics) <= set(registry.PAIR_CRITICS)]
ESTIMATORS = [registry.find(name) for name in registry.estimators()]
FAMILIES: dict[str, Callable[[], Critic]] = {
    "inner product": lambda: SeparableCritic(3, 3, hidden_dims=(8,), embed_dim=4),
    "concat": lambda: ConcatCritic(3, 3, hidden_dims=(8, 6)),
}
RHO = 0.8
TRUTH = -0.5 * math.log(1 - RHO**2)


def name_of(declaration: registry.Declaration) -> str:
    return declaration.name


def samples(*lead: int, batch: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(*lead, batch, 3, dtype=torch.float64)
    y = x + torch.randn(*lead, batch, 3, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("declaration", PAIRED, ids=name_of)
@pytest.mark.parametrize("lead", [(), (2, 2)], ids=str)
def test_values_losses_and_gradients_for_every_critic_declared(
    declaration: registry.Declaration, lead: tuple[int, ...]
) -> None:
    for family in declaration.critics:
        bound = declaration.bound(FAMILIES[family]().double())
        x, y = (t.requires_grad_() for t in samples(*lead))
        value, loss = bound(x, y), bound.learning_loss(x, y)
        assert value.shape == loss.shape == lead
        for number in (value, loss):
            gradients = torch.autograd.grad(number.sum(), [x, y, *bound.critic.parameters()], allow_unused=True)
            reached = [g for g in gradients if g is not None]
            assert all(g.isfinite().all() for g in reached) and any((g != 0).any() for g in reached)


@pytest.mark.parametrize("declaration", PAIRED, ids=name_of)
def test_the_order_of_samples_does_not_matter(declaration: registry.Declaration) -> None:
    bound = declaration.bound(FAMILIES["inner product"]().double()).eval()
    x, y = samples()
    order = torch.randperm(x.shape[0])
    torch.testing.assert_close(bound(x[order], y[order]), bound(x, y))


@pytest.mark.parametrize("declaration", PAIRED, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_short_inputs_give_fp32_values_near_the_exact_ones(
    declaration: registry.Declaration, dtype: torch.dtype
) -> None:
    critic = FAMILIES["inner product"]()
    x, y = samples(dtype=dtype)
    exact = declaration.bound(critic.double()).eval()(x.double(), y.double())
    value = declaration.bound(critic.to(dtype)).eval()(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, atol=100 * torch.finfo(dtype).eps, rtol=0)


class Oracle(Critic):
    """The log density ratio of a bivariate Gaussian with correlation RHO, times `slope`."""

    def __init__(self, slope: float):
        super().__init__()
        self.product = mk.DotCritic()
        self.slope = slope

    def statistics(self, x: Tensor, y: Tensor, *arguments, **options):
        of_x, of_y = -(RHO**2) * x.square() / 2, -(RHO**2) * y.square() / 2
        one = torch.ones_like(x)
        factor = self.slope / (1 - RHO**2)
        constant = -0.5 * math.log(1 - RHO**2) * self.slope
        left = torch.cat([factor * RHO * x, factor * of_x + constant, one], -1)
        return self.product.statistics(left, torch.cat([y, one, factor * of_y], -1), *arguments, **options)


def over_batches(declaration: registry.Declaration, slope: float) -> tuple[float, float]:
    """Mean and standard error of the bound over 40 batches of 256 Gaussian samples."""
    draw = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 40, 256, 1, generator=draw, dtype=torch.float64)
    values = declaration.bound(Oracle(slope)).eval()(x, RHO * x + math.sqrt(1 - RHO**2) * noise)
    return values.mean().item(), (values.std() / math.sqrt(40)).item()


@pytest.mark.parametrize("declaration", [d for d in ESTIMATORS if d.kind == "lower"], ids=name_of)
@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_lower_bounds_lie_below(declaration: registry.Declaration, slope: float) -> None:
    value, error = over_batches(declaration, slope)
    assert value <= TRUTH + 3 * error


@pytest.mark.parametrize("declaration", [d for d in ESTIMATORS if d.kind == "upper"], ids=name_of)
def test_upper_bounds_lie_above_at_the_best_critic(declaration: registry.Declaration) -> None:
    value, error = over_batches(declaration, 1.0)
    assert value >= TRUTH - 3 * error


@pytest.mark.parametrize("declaration", ESTIMATORS, ids=name_of)
def test_ceilings_are_where_they_are_declared(declaration: registry.Declaration) -> None:
    """With positive scores of 30 and negative ones of -30, a bound reaches its declared ceiling or, if it declares
    none, exceeds log B."""
    rows, one = math.sqrt(60) * torch.eye(40, dtype=torch.float64), torch.ones(40, 1, dtype=torch.float64)
    x, y = torch.cat([rows, -30 * one], -1), torch.cat([rows, one], -1)
    value = declaration.estimator(mk.DotCritic()).eval()(x, y).item()
    if declaration.ceiling is None:
        assert value > math.log(40) + 1
    else:
        assert value == pytest.approx(declaration.highest(40), abs=0.05)
        assert value <= declaration.highest(40) + 1e-9


def test_bounds_trained_by_another_share_its_loss() -> None:
    x, y = samples()
    for declaration in ESTIMATORS:
        critic = FAMILIES["concat"]().double()
        other = registry.find(declaration.trained_by).bound(critic)
        torch.testing.assert_close(declaration.bound(critic).learning_loss(x, y), other.learning_loss(x, y))


def test_every_bound_of_the_package_is_declared() -> None:
    declared = {d.bound for d in registry.declarations()}
    for name, found in vars(mk.bounds).items():
        if isinstance(found, type) and hasattr(found, "learning_loss"):
            assert found in declared, name


def test_docs_list_every_bound() -> None:
    page = (ROOT / "docs" / "bounds.md").read_text().splitlines()
    missing = [line for line in registry.table() if line not in page]
    assert not missing, "add to docs/bounds.md, as `python -m mi_kernels bounds` prints them:\n" + "\n".join(missing)


@pytest.mark.parametrize("arguments, message", [
    ({"kind": "middle"}, "kind must be one of lower, upper, neither, got 'middle'"),
    ({"critics": ("any",)}, "critics must be a tuple of"),
    ({"name": "nwj"}, "name must be new: 'nwj' is the name of NWJ"),
])
def test_bad_declarations_are_refused(arguments: dict, message: str) -> None:
    class Mine(nn.Module):
        pass

    given = {"name": "mine_of_mine", "kind": "lower", "value": "0", "negatives": "none"} | arguments
    with pytest.raises(ValueError, match=message):
        registry.declare(given.pop("name"), **given)(Mine)
    assert "mine_of_mine" not in [d.name for d in registry.declarations()]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of barber_agakov, club"):
        registry.find("best")
