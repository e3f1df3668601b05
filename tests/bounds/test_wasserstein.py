"""The Wasserstein dependency measure: penalty, spectral norm, known distances."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_kernels.bounds import WassersteinDependency
from mi_kernels.critics import BilinearCritic, ConcatCritic, Critic, DotCritic, SeparableCritic
from mi_kernels.ops.common.statistics import Statistics


class Linear(Critic):
    """f(x, y) = <a, x> + <b, y>: its gradient is (a, b) everywhere and its Wasserstein dependency is 0."""

    def __init__(self, a: list[float], b: list[float]):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))

    def statistics(self, x, y, stats=("positive", "row_lse"), pairs="all", *, clip=None):
        s = (x @ self.a)[..., :, None] + (y @ self.b)[..., None, :]
        positive = s.diagonal(dim1=-2, dim2=-1)
        return Statistics(positive=positive, row_sum=s.sum(-1) - positive)


def draw(*lead: int, batch: int = 9) -> tuple[Tensor, Tensor]:
    x, y = (torch.randn(*lead, batch, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x, y


@pytest.mark.parametrize("lead", [(), (3,)])
def test_the_penalty_is_that_of_a_linear_critic(lead: tuple[int, ...]) -> None:
    critic = Linear([1.0, 2.0, 0.0, 0.0], [0.0, 0.0, -2.0, 4.0])
    bound = WassersteinDependency(critic, penalty=3.0)
    x, y = draw(*lead)
    loss = bound.learning_loss(x, y)
    torch.testing.assert_close(loss, torch.full(lead, 48.0, dtype=torch.float64))
    gradient = torch.autograd.grad(loss.sum(), [critic.a, critic.b])
    groups = math.prod(lead)
    torch.testing.assert_close(torch.cat(gradient), groups * 24 / 5 * torch.cat([critic.a, critic.b]))
    torch.testing.assert_close(bound.gradient_norm(x, y), torch.full((*lead, 9), 5.0, dtype=torch.float64))
    assert bound.gradient_norm_mean.shape == lead
    assert "mean 5.000, max 5.000" in repr(bound)


@pytest.mark.parametrize(
    "critic",
    [
        DotCritic(),
        BilinearCritic(4, 4).double(),
        SeparableCritic(4, 4, hidden_dims=(6,), embed_dim=3, activation="tanh").double(),
        ConcatCritic(4, 4, hidden_dims=(6, 5), activation="tanh").double(),
        ConcatCritic(4, 4, hidden_dims=(6, 5), activation="tanh", groups=2).double(),
    ],
    ids=["dot", "bilinear", "separable", "concat", "grouped"],
)
def test_the_penalty_trains_the_critic_and_not_the_inputs(critic: Critic) -> None:
    bound = WassersteinDependency(critic, penalty=0.7)
    x, y = draw(2)
    state = bound.draws.get_extra_state()

    def loss() -> Tensor:
        bound.draws.set_extra_state(state)
        return bound.learning_loss(x, y).sum()

    inputs = torch.autograd.grad(loss(), [x, y])
    for a, b in zip(inputs, torch.autograd.grad(-bound(x, y).sum(), [x, y]), strict=True):
        torch.testing.assert_close(a, b)
    parameters = list(critic.parameters())
    if not parameters:
        return
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), parameters), directions, strict=True))
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        ends.append(loss().item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_a_zero_critic_has_finite_gradients() -> None:
    critic = BilinearCritic(4, 4).double()
    nn.init.zeros_(critic.weight)
    loss = WassersteinDependency(critic).learning_loss(*draw())
    assert loss.item() == pytest.approx(10)
    (gradient,) = torch.autograd.grad(loss, critic.weight)
    assert gradient.isfinite().all()


def test_draws_leave_the_global_generator_alone_and_survive_checkpoint_copy_and_pickle(tmp_path) -> None:
    bound = WassersteinDependency(Linear([1.0] * 4, [2.0] * 4))
    x, y = draw()
    before = torch.get_rng_state()
    bound.learning_loss(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.save(bound.state_dict(), tmp_path / "bound.pt")
    resumed = WassersteinDependency(Linear([0.0] * 4, [0.0] * 4), seed=7)
    resumed.load_state_dict(torch.load(tmp_path / "bound.pt"))
    copies = [resumed, copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))]
    want = bound.draws.permutation(50)
    for other in copies:
        assert torch.equal(other.draws.permutation(50), want)
    assert not torch.equal(bound.draws.permutation(50), want)


def test_evaluation_without_gradients_needs_none() -> None:
    bound = WassersteinDependency(ConcatCritic(4, 4, hidden_dims=(6,)).double())
    with torch.no_grad():
        loss = bound.learning_loss(*draw())
        norm = bound.gradient_norm(*draw())
    assert not loss.requires_grad and not norm.requires_grad


@pytest.mark.parametrize("groups", [None, 2])
def test_spectral_norm_makes_the_critic_lipschitz(groups: int | None) -> None:
    critic = ConcatCritic(4, 4, hidden_dims=(16, 16), groups=groups).double()
    with torch.no_grad():
        for p in critic.parameters():
            p *= 30
    bound = WassersteinDependency(critic, penalty=0.0, spectral_norm=True)
    lead = () if groups is None else (groups,)
    for _ in range(60):
        bound.learning_loss(*draw(*lead))
    for layer in critic.layers:
        top = torch.linalg.matrix_norm(layer.weight.detach(), 2)  # type: ignore[arg-type, operator]
        torch.testing.assert_close(top, torch.ones(lead, dtype=torch.float64), rtol=1e-3, atol=0)
    assert bound.gradient_norm(*draw(*lead)).max() <= 1.001
    assert (bound.gradient_norm_max <= 1.001).all() and (bound.gradient_norm_mean > 0.01).all()
    x, y = draw(*lead)
    loss = bound.learning_loss(x, y).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(critic.parameters())))
    again = ConcatCritic(4, 4, hidden_dims=(16, 16), groups=groups).double()
    other = WassersteinDependency(again, penalty=0.0, spectral_norm=True)
    other.load_state_dict(bound.state_dict())
    torch.testing.assert_close(other.eval()(x, y), bound.eval()(x, y))


def test_spectral_norm_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="critic must have layers with a weight"):
        WassersteinDependency(DotCritic(), spectral_norm=True)


def steepest(critic: torch.nn.Module) -> float:
    """The critic's Lipschitz constant on the four values of a pair of bits."""
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    scores = critic(points[:, :1], points[:, 1:]).diagonal()
    i, j = torch.combinations(torch.arange(4)).mT
    return ((scores[i] - scores[j]).abs() / (points[i] - points[j]).norm(dim=-1)).max().item()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_penalised_critic_reaches_the_distance_of_noisy_bits(seed: int) -> None:
    """W_1 between two bits that agree with probability 0.82 = (1 - e)^2 + e^2 and two independent bits is 0.32."""
    torch.manual_seed(seed)
    critic = ConcatCritic(1, 1, hidden_dims=(32, 32))
    bound = WassersteinDependency(critic, penalty=10.0)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.5, 0.9))
    counts = torch.tensor([41, 9, 9, 41])
    cells = torch.arange(4).repeat_interleave(counts)
    x, y = ((cells // 2).float()[:, None], (cells % 2).float()[:, None])
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97 ** max(0, step - 350))
    for _ in range(500):
        loss = bound.learning_loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    # A finite batch excludes the positive pairs from Q, which changes the distance to 0.82 - 4918 / 9900 = 0.3232. A
    # critic's value is at most the distance times its Lipschitz constant. That is computed here, because
    # gradient_norm_mean is about random points and about the critic before the last step.
    slope, distance = steepest(critic), 0.82 - 4918 / 9900
    assert 0.95 * distance < bound(x, y).item() / slope < distance + 1e-5
    assert 0.9 < slope < 1.1 and 0.9 < bound.gradient_norm_mean.item() < 1.1


def test_tables_of_the_distance_reach_its_closed_form() -> None:
    """The optimal potential of noisy bits is 1 where both bits agree and 0 elsewhere."""
    n = 100
    cells = torch.arange(4).repeat_interleave(torch.tensor([41, 9, 9, 41]))
    x, y = (F.one_hot(side, 2).double() for side in (cells // 2, cells % 2))
    critic = BilinearCritic(2, 2).double()
    with torch.no_grad():
        critic.weight.copy_(torch.eye(2))
    # off-diagonal pairs agree with probability (n^2 / 2 - 82) / (n (n - 1)) instead of 1 / 2
    expected = 0.82 - (n * n / 2 - 82) / (n * (n - 1))
    assert WassersteinDependency(critic)(x, y).item() == pytest.approx(expected, abs=1e-12)
