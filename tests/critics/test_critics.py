"""Critics: the scores that they define, and statistics that agree with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mi_kernels.critics import BilinearCritic, ConcatCritic, Critic, DotCritic, SeparableCritic
from mi_kernels.critics.base import check_as_network
from mi_kernels.ops.common.statistics import STATISTICS
from mi_kernels.ops.mlp_critic.reference import reduce_scores

CLIP = 0.05
CRITICS = {
    "dot": lambda: DotCritic(temperature=0.5),
    "cosine": lambda: DotCritic(temperature=0.3, normalize=True),
    "bilinear": lambda: BilinearCritic(4, 4),
    "separable": lambda: SeparableCritic(4, 4, hidden_dims=(8, 6), embed_dim=3, activation="gelu"),
    "concat": lambda: ConcatCritic(4, 4, hidden_dims=(8, 6), memory_budget=1),
}


def pair(b: int = 7, n: int = 7, lead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    return torch.randn(*lead, b, 4, dtype=torch.float64), torch.randn(*lead, n, 4, dtype=torch.float64)


@pytest.mark.parametrize("pairs", ["all", "off_diagonal"])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("name", CRITICS)
def test_statistics_are_those_of_the_scores(name: str, lead: tuple[int, ...], pairs: str) -> None:
    critic: Critic = CRITICS[name]().double()
    x, y = pair(lead=lead)
    inputs = [x.requires_grad_(), y.requires_grad_(), *critic.parameters()]
    scores = critic(x, y)
    assert scores.shape == (*lead, 7, 7)
    flat = scores.reshape(-1, 7, 7)
    expected = [t.view(*lead, 7) for t in reduce_scores(flat, pairs == "off_diagonal", CLIP)]
    found = critic.statistics(x, y, STATISTICS, pairs, clip=CLIP)
    assert (scores.abs() > CLIP).any() and found.clipped_row_lse is not None
    assert not found.clipped_row_lse.requires_grad
    weights = [torch.randn_like(t) for t in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(of, weights, strict=True)), inputs)
        for of in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", CRITICS)
def test_only_what_was_asked_for_is_returned(name: str, statistic: str) -> None:
    found = CRITICS[name]().double().statistics(*pair(), stats=(statistic,), clip=1.0)
    assert [s for s, t in found._asdict().items() if t is not None] == [statistic]


@pytest.mark.parametrize("name", CRITICS)
def test_rectangular_batches_without_positives(name: str) -> None:
    critic = CRITICS[name]().double()
    x, y = pair(5, 9)
    found = critic.statistics(x, y, stats=("row_lse", "col_lse", "row_sum"))
    scores = critic(x, y)
    torch.testing.assert_close(found.row_lse, scores.logsumexp(1))
    torch.testing.assert_close(found.col_lse, scores.logsumexp(0))
    torch.testing.assert_close(found.row_sum, scores.sum(1))
    with pytest.raises(ValueError, match="as many samples"):
        critic.statistics(x, y)


def test_concat_critic_is_a_sequential_on_concatenated_inputs() -> None:
    critic = ConcatCritic(3, 2, hidden_dims=(6, 5), activation="tanh")
    first, second, last = critic.layers
    mlp = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
    x, y = torch.randn(4, 3), torch.randn(6, 2)
    pairs = torch.cat([x[:, None].expand(4, 6, 3), y[None].expand(4, 6, 2)], -1)
    torch.testing.assert_close(critic(x, y), mlp(pairs).squeeze(-1))


def test_grouped_concat_critic_is_independent_critics() -> None:
    grouped = ConcatCritic(3, 2, hidden_dims=(6, 5), groups=2)
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    found = grouped.statistics(x, y, STATISTICS, clip=CLIP)
    for g in range(2):
        single = ConcatCritic(3, 2, hidden_dims=(6, 5))
        single.load_state_dict({name: t[g] for name, t in grouped.state_dict().items()})
        for a, b in zip(found, single.statistics(x[g], y[g], STATISTICS, clip=CLIP), strict=True):
            torch.testing.assert_close(a[g], b)


def test_factorcl_critic_has_the_parameters_of_the_public_code() -> None:
    count = sum(p.numel() for p in ConcatCritic(128, 128).parameters())
    assert count == 256 * 512 + 512 + 512 * 512 + 512 + 512 + 1


def test_a_temperature_parameter_is_learned() -> None:
    critic = DotCritic(temperature=nn.Parameter(torch.tensor(0.5, dtype=torch.float64)))
    x, y = pair()
    gradients = []
    for scores in (critic.statistics(x, y, ("row_lse",)).row_lse, critic(x, y).logsumexp(1)):
        assert scores is not None
        gradients.append(torch.autograd.grad(scores.sum(), list(critic.parameters()))[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", CRITICS)
def test_autocast_gives_fp32_statistics_near_the_exact_ones(name: str) -> None:
    critic = CRITICS[name]()
    x, y = (t.float() for t in pair())
    with torch.autocast("cpu", torch.bfloat16):
        found = critic.statistics(x, y, STATISTICS, clip=CLIP)
    for a, b in zip(found, critic.statistics(x, y, STATISTICS, clip=CLIP), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("first", [nn.Dropout(0.1), nn.Identity(), nn.Flatten()])
def test_a_network_that_begins_without_weights_takes_any_input(first: nn.Module) -> None:
    check_as_network("x", torch.zeros(2, 3, dtype=torch.float64), nn.Sequential(first, nn.Linear(3, 3)))


@pytest.mark.parametrize("name", [name for name in CRITICS if list(CRITICS[name]().parameters())])
def test_float64_arrays_meet_a_float32_critic(name: str) -> None:
    critic = CRITICS[name]()
    for call in (critic, critic.statistics):
        with pytest.raises(ValueError, match=r"[xy] must have the dtype of the network, torch.float32, got"):
            call(*pair())


@pytest.mark.parametrize("name", CRITICS)
def test_bad_inputs_are_named(name: str) -> None:
    critic = CRITICS[name]().double()
    x, y = pair()
    for bad_x, bad_y, message in [
        (x[:0], y[:0], "x must"),
        (x, y[:, :3], "y must"),
        (x, y.float(), "y must have the dtype"),
        (x, y.to("meta"), "y must be on the device"),
        (x, y.expand(2, 7, 4), "y must have the leading"),
        (x[0], y[0], "x must"),
    ]:
        with pytest.raises(ValueError, match=message):
            critic.statistics(bad_x, bad_y)
    with pytest.raises(ValueError, match="stats must"):
        critic.statistics(x, y, stats=("rows",))
    with pytest.raises(ValueError, match="pairs must"):
        critic.statistics(x, y, pairs="some")
    for clip in (None, 0.0, -1.0):
        with pytest.raises(ValueError, match="clip must be a positive number"):
            critic.statistics(x, y, stats=("clipped_row_lse",), clip=clip)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DotCritic(temperature=0.0), "temperature must be positive"),
        (lambda: BilinearCritic(0, 3), "x_dim must be at least 1"),
        (lambda: SeparableCritic(3, 3, activation="max"), "activation must be one of"),
        (lambda: SeparableCritic(3, 3, embed_dim=0), "embed_dim must be at least 1"),
        (lambda: ConcatCritic(3, 0), "y_dim must be at least 1"),
        (lambda: ConcatCritic(3, 3, hidden_dims=()), "hidden_dims must hold"),
        (lambda: ConcatCritic(3, 3, groups=0), "groups must be at least 1"),
        (lambda: ConcatCritic(3, 3, activation="max"), "activation must be one of"),
    ],
)
def test_bad_settings_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
