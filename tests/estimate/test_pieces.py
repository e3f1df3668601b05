"""Parts of estimate_mi: preprocessing, canonical pairs, critics, the value on held-out samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels.bounds.info_nce import SymmetricInfoNCE
from mi_kernels.critics import Critic
from mi_kernels.estimate import held_out
from mi_kernels.estimate.hybrid import (
    CanonicalPairs,
    GaussianCritic,
    HybridCritic,
    MeanCritic,
    ScalarCritic,
    choose_pairs,
)
from mi_kernels.estimate.preprocessing import Coordinates, Preprocessing, RankNormal

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ranks_become_normal_quantiles_with_ties_in_the_middle() -> None:
    rank = RankNormal(torch.tensor([[1.0], [2.0], [2.0], [5.0]]))
    expected = torch.special.ndtri(torch.tensor([0.125, 0.5, 0.75, 0.875, 0.125], dtype=torch.float64))
    found = rank(torch.tensor([[1.0], [2.0], [3.5], [9.0], [-4.0]]))[:, 0]
    torch.testing.assert_close(found, expected)


def test_features_ignore_the_units_and_follow_single_samples(generator: torch.Generator) -> None:
    fitted, other = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)
    plain = Preprocessing(fitted)(other)
    scaled = Preprocessing(fitted * 7 - 2)(other * 7 - 2)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    alone = Preprocessing(fitted)(other[:1])
    torch.testing.assert_close(alone.features, plain.features[:1])


def test_gaussian_critic_is_the_log_density_ratio(generator: torch.Generator) -> None:
    n, rho = 100_000, torch.tensor([0.8, 0.3])
    x = torch.randn(n, 2, generator=generator)
    y = torch.cat([rho * x + (1 - rho**2).sqrt() * torch.randn(n, 2, generator=generator), x[:, :1] * 0], -1)
    y[:, 2] = torch.randn(n, generator=generator)
    of_x, of_y = Preprocessing(x.double()), Preprocessing(y.double())
    pairs = CanonicalPairs.fit(of_x(x.double()), of_y(y.double()), turned=False)
    torch.testing.assert_close(pairs.correlations.float(), rho, atol=0.02, rtol=0)
    a, b = pairs.first(2).inputs(of_x(x[:7].double()), of_y(y[:5].double()))
    scores = GaussianCritic()(a[:, :3], b[:, :3])
    u, v = x[:7, None], y[None, :5, :2]
    expected = ((rho * u * v - rho**2 * (u**2 + v**2) / 2) / (1 - rho**2)).sum(-1)
    torch.testing.assert_close(scores, expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("name, count", [("multinormal-dense-25-25-0.5", 1), ("multinormal-sparse-5-5-2-2.0", 2)])
def test_canonical_pairs_are_counted_on_validation_samples(name: str, count: int) -> None:
    x, y = mk.tasks.FORTY[name].sample(3000, 1, dtype=torch.float64)
    of_x, of_y = Preprocessing(x), Preprocessing(y)
    parts = [(of_x(x[s]), of_y(y[s])) for s in (slice(0, 2000), slice(2000, 3000))]
    pairs, value = choose_pairs(*parts)
    assert pairs.correlations.numel() == count and value > 0.9


def test_no_canonical_pair_of_independent_samples(generator: torch.Generator) -> None:
    x, y = torch.randn(2, 2000, 10, generator=generator, dtype=torch.float64)
    of_x, of_y = Preprocessing(x), Preprocessing(y)
    parts = [(of_x(x[s]), of_y(y[s])) for s in (slice(0, 1500), slice(1500, 2000))]
    assert choose_pairs(*parts)[0].correlations.numel() == 0


def test_networks_on_top_see_variates_of_both_kinds_and_radii_alone() -> None:
    x, y = mk.tasks.FORTY["spiral-multinormal-sparse-5-5-2-2.0"].sample(2000, 1, dtype=torch.float64)
    of_x, of_y = Preprocessing(x)(x), Preprocessing(y)(y)
    parts = (slice(1500), slice(1500, 2000))
    train, validation = (tuple(Coordinates(*(t[part] for t in side)) for side in (of_x, of_y)) for part in parts)
    pairs, _ = choose_pairs(train, validation)
    assert pairs.other is not None and pairs.other.turned != pairs.turned
    seen = pairs.correlations.numel() + pairs.other.correlations.numel() + 2
    assert pairs.widths(of_x, of_y) == [(seen, of_x.features.shape[1]), (seen, of_y.features.shape[1])]
    left, _ = pairs.inputs(of_x, of_y)
    first = pairs.correlations.numel() + 1
    variates = torch.cat([pairs.variates(of_x, of_y)[0], pairs.other.variates(of_x, of_y)[0]], -1).float()
    assert torch.equal(left[:, first : first + seen], torch.cat([variates, of_x.radii], -1))
    critic = HybridCritic(first - 1, *pairs.widths(of_x, of_y))
    assert torch.equal(critic._seen(left, critic.x_widths), left[:, first : first + seen])


def test_scalar_critic_sees_the_last_columns_side_by_side(generator: torch.Generator) -> None:
    critic = ScalarCritic(3, 2)
    x, y = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    scores = critic(x, y)
    torch.testing.assert_close(scores, critic.network(x[:, 2:], y[:, 3:]))
    found = critic.statistics(x, y, stats=("positive", "col_lse"))
    torch.testing.assert_close(found.positive, scores.diagonal())
    torch.testing.assert_close(found.col_lse, scores.logsumexp(0))


def test_mean_critic_scores_are_the_mean(generator: torch.Generator) -> None:
    critics = [HybridCritic(2, (3, 4), (3, 5), gaussian=gaussian) for gaussian in (True, False)]
    for critic in critics:
        nn.init.normal_(critic.y_network.last.weight)
    x, y = torch.randn(6, 10, generator=generator), torch.randn(9, 11, generator=generator)
    expected = (critics[0](x, y) + critics[1](x, y)) / 2
    torch.testing.assert_close(MeanCritic(critics)(x, y), expected)


def test_symmetric_infonce_is_the_mean_of_both_anchors(generator: torch.Generator) -> None:
    critic: Critic = mk.SeparableCritic(3, 2, (8,), 4)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
    expected = (mk.InfoNCE(critic)(x, y) + mk.InfoNCE(critic, anchor="y")(x, y)) / 2
    torch.testing.assert_close(SymmetricInfoNCE(critic)(x, y), expected)


class _MeanOfX(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mean()


def test_jackknife_of_a_mean_is_the_error_of_a_mean(generator: torch.Generator) -> None:
    x = torch.randn(1000, 1, generator=generator)
    groups = torch.stack([x[k::10].mean() for k in range(10)])
    found = held_out.evaluate(_MeanOfX(), x, x, 5000)
    assert found.mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert found.sampling_error == pytest.approx((groups.std() / math.sqrt(10)).item(), rel=1e-3)


def test_blocks_bound_the_candidates(generator: torch.Generator) -> None:
    x = torch.randn(250, 3, generator=generator)
    found = held_out.evaluate(SymmetricInfoNCE(mk.DotCritic()), x, x, 100)
    assert found.candidates == 83 and found.mean <= math.log(83)
