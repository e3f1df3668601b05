"""InfoNCE and NCE-CLUB: golden numbers of FactorCL's public code, closed forms, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mi_kernels.bounds import NCECLUB, InfoNCE
from mi_kernels.critics import BilinearCritic, ConcatCritic, Critic, DotCritic
from tests.bounds.formulas import oracle_features


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    n = math.prod(shape)
    return torch.sin(k * torch.arange(1, n + 1, dtype=torch.float64)).view(shape)


def golden_critic(x_dim: int, y_dim: int, **options: int) -> ConcatCritic:
    critic = ConcatCritic(x_dim, y_dim, hidden_dims=(6, 6), **options).double()
    with torch.no_grad():
        for i, layer in enumerate(critic.layers):
            layer.weight.copy_(wave(tuple(layer.weight.shape), 0.7 + 0.1 * i))  # type: ignore[operator, union-attr, arg-type]
            layer.bias.copy_(0.1 * wave(tuple(layer.bias.shape), 0.7 + 0.05 * i))  # type: ignore[operator, union-attr, arg-type]
    return critic


GOLDEN_X, GOLDEN_Y = wave((4, 3), 1.3), wave((4, 2), 0.9)


class Additive(Critic):
    """Scores of another critic plus a function of x_i and one of y_j."""

    def __init__(self, critic: Critic, of_x: float, of_y: float):
        super().__init__()
        self.critic, self.of_x, self.of_y = critic, of_x, of_y

    def statistics(self, x: Tensor, y: Tensor, stats=(), pairs: str = "all"):
        from mi_kernels.ops.common.statistics import Statistics
        from mi_kernels.ops.mlp_critic.reference import reduce_scores

        s = self.critic(x, y) + self.of_x * x.sum(-1, keepdim=True).sin()
        s = s + self.of_y * y.sum(-1).cos().unsqueeze(-2)
        return Statistics(*(t[0] for t in reduce_scores(s[None], False)))


@pytest.mark.parametrize("memory_budget", [1, 2**26])
def test_golden_numbers_of_the_public_code(memory_budget: int) -> None:
    critic = golden_critic(3, 2, memory_budget=memory_budget)
    first_row = critic(GOLDEN_X, GOLDEN_Y).T[0]
    expected = torch.tensor([0.106021, 2.081829, 1.024071, 0.005726], dtype=torch.float64)
    torch.testing.assert_close(first_row, expected, rtol=0, atol=6e-7)
    loss = InfoNCE(critic, anchor="y").learning_loss(GOLDEN_X, GOLDEN_Y)
    assert loss.item() == pytest.approx(0.5189812194, abs=1e-10)
    club = NCECLUB(golden_critic(2, 3, memory_budget=memory_budget), anchor="x")
    assert club(GOLDEN_Y, GOLDEN_X).item() == pytest.approx(-0.4357665150, abs=1e-10)
    assert club.learning_loss(GOLDEN_Y, GOLDEN_X).item() == pytest.approx(0.5832068440, abs=1e-10)


@pytest.mark.parametrize("anchor", ["x", "y"])
def test_zero_critic_knows_nothing(anchor: str) -> None:
    critic = ConcatCritic(3, 2, hidden_dims=(4,)).double()
    for p in critic.parameters():
        torch.nn.init.zeros_(p)
    for bound in (InfoNCE(critic, anchor=anchor), NCECLUB(critic, anchor=anchor)):
        assert bound(GOLDEN_X, GOLDEN_Y).item() == pytest.approx(0, abs=1e-15)


def test_a_fresh_critic_gives_nearly_nothing() -> None:
    critic = ConcatCritic(16, 16)
    assert abs(InfoNCE(critic)(torch.randn(64, 16), torch.randn(64, 16)).item()) < 0.01


@pytest.mark.parametrize("anchor", ["x", "y"])
def test_info_nce_is_at_most_log_batch(anchor: str) -> None:
    x = torch.randn(9, 5, dtype=torch.float64)
    value = InfoNCE(DotCritic(temperature=1e-3), anchor=anchor)(x, x)
    assert value.item() <= math.log(9) + 1e-12
    assert InfoNCE(DotCritic(temperature=1e-3, normalize=True), anchor=anchor)(x, x).item() == pytest.approx(
        math.log(9)
    )


def test_one_sample_carries_no_information() -> None:
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    critic = ConcatCritic(3, 2, hidden_dims=(4, 4)).double()
    assert InfoNCE(critic)(x, y).item() == pytest.approx(0, abs=1e-12)
    assert NCECLUB(critic)(x, y).item() == pytest.approx(0, abs=1e-12)


def test_a_function_of_the_anchor_changes_nothing() -> None:
    critic = golden_critic(3, 2)
    plain_x, plain_y = (InfoNCE(critic, anchor=a)(GOLDEN_X, GOLDEN_Y) for a in "xy")
    of_x, of_y = Additive(critic, 1.0, 0.0), Additive(critic, 0.0, 1.0)
    torch.testing.assert_close(InfoNCE(of_x, anchor="x")(GOLDEN_X, GOLDEN_Y), plain_x)
    torch.testing.assert_close(InfoNCE(of_y, anchor="y")(GOLDEN_X, GOLDEN_Y), plain_y)
    assert abs(InfoNCE(of_y, anchor="x")(GOLDEN_X, GOLDEN_Y) - plain_x) > 1e-3
    assert abs(InfoNCE(of_x, anchor="y")(GOLDEN_X, GOLDEN_Y) - plain_y) > 1e-3
    for changed in (of_x, of_y):
        torch.testing.assert_close(NCECLUB(changed)(GOLDEN_X, GOLDEN_Y), NCECLUB(critic)(GOLDEN_X, GOLDEN_Y))


@pytest.mark.parametrize(("mi", "club", "nce"), [(2, 4.43, 1.98), (4, 9.84, 3.69), (10, 34.37, 6.05)])
def test_oracle_critic_of_gaussians_meets_the_closed_form(mi: float, club: float, nce: float) -> None:
    d, b, repeats = 20, 512, 8
    rho = math.sqrt(1 - math.exp(-2 * mi / d))
    assert d * rho**2 / (1 - rho**2) == pytest.approx(club, abs=0.04)
    upper, lower = [], []
    for _ in range(repeats):
        x = torch.randn(b, d, dtype=torch.float64)
        y = rho * x + math.sqrt(1 - rho**2) * torch.randn(b, d, dtype=torch.float64)
        features = oracle_features(x, y, rho)
        upper.append(NCECLUB(DotCritic())(*features).item())
        lower.append(InfoNCE(DotCritic())(*features).item())
    expected = (b - 1) / b * d * rho**2 / (1 - rho**2)
    found, spread = torch.tensor(upper).mean().item(), torch.tensor(upper).std().item()
    assert abs(found - expected) < 4 * spread / math.sqrt(repeats)
    assert torch.tensor(lower).mean().item() == pytest.approx(nce, abs=0.1)


@pytest.mark.parametrize("anchor", ["x", "y"])
def test_bounds_are_those_of_materialised_scores(anchor: str) -> None:
    critic = ConcatCritic(3, 2, hidden_dims=(8, 8), groups=4, memory_budget=1).double()
    x, y = torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(4, 6, 2, dtype=torch.float64)
    scores = critic(x, y)
    positive = scores.diagonal(dim1=1, dim2=2).mean(-1)
    nce = positive - scores.logsumexp(2 if anchor == "x" else 1).mean(-1) + math.log(6)
    torch.testing.assert_close(InfoNCE(critic, anchor=anchor)(x, y), nce)
    torch.testing.assert_close(InfoNCE(critic, anchor=anchor).learning_loss(x, y), -nce)
    torch.testing.assert_close(NCECLUB(critic, anchor=anchor)(x, y), positive - scores.mean((1, 2)))
    torch.testing.assert_close(NCECLUB(critic, anchor=anchor).learning_loss(x, y), -nce)


def test_condition_is_concatenated_to_both_sides() -> None:
    x, y, label = torch.randn(6, 3), torch.randn(6, 2), torch.randint(0, 3, (6, 1))
    critic = ConcatCritic(4, 3, hidden_dims=(8,))
    both = torch.cat([x, label], -1), torch.cat([y, label], -1)
    for bound in (InfoNCE(critic), NCECLUB(critic)):
        torch.testing.assert_close(bound(x, y, condition=label), bound(*both))
        torch.testing.assert_close(bound.learning_loss(x, y, condition=label), bound.learning_loss(*both))


def test_permuting_the_batch_changes_nothing() -> None:
    critic = ConcatCritic(3, 2, hidden_dims=(8, 8), memory_budget=1).double()
    x, y = torch.randn(11, 3, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    order = torch.randperm(11)
    for bound in (InfoNCE(critic), NCECLUB(critic)):
        torch.testing.assert_close(bound(x[order], y[order]), bound(x, y))


def test_training_a_critic_approaches_the_mutual_information() -> None:
    rho, mi = 0.9, -0.5 * math.log(1 - 0.81)
    critic = ConcatCritic(1, 1, hidden_dims=(32, 32))
    bound = InfoNCE(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    values = []
    for _ in range(250):
        x = torch.randn(128, 1)
        y = rho * x + math.sqrt(1 - rho**2) * torch.randn(128, 1)
        loss = bound.learning_loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(-loss.item())
    assert sum(values[-50:]) / 50 == pytest.approx(mi, abs=0.12)


@pytest.mark.parametrize("bound", [InfoNCE, NCECLUB])
def test_compiles_without_graph_breaks(bound: type) -> None:
    module = bound(ConcatCritic(3, 2, hidden_dims=(8, 8), memory_budget=512))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))


@pytest.mark.parametrize("bound", [InfoNCE, NCECLUB])
def test_bad_inputs_are_named(bound: type) -> None:
    module = bound(BilinearCritic(3, 2))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for arguments, message in [
        ((x[:5], y), "y must have the batch dimensions of x"),
        ((x[:0], y[:0]), "x must"),
        ((x, y[0]), "y must"),
        ((x, y, torch.zeros(5, 1)), "condition must be"),
        ((x, y, torch.zeros(6, 1)), r"x must be \[\*, batch, 3\]"),
        ((y, x), "x must"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*arguments)
        with pytest.raises(ValueError, match=message):
            module.learning_loss(*arguments)
    with pytest.raises(ValueError, match="anchor must be one of"):
        bound(BilinearCritic(3, 2), anchor="z")
