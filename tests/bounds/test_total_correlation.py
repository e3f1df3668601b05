"""Total correlation: shuffles, values from scores, noisy bits, Gaussians with three modalities, seeds, errors."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mi_kernels.bounds import JointCritic, TotalCorrelation
from mi_kernels.bounds.base import Draws

MEASURES = ("kl", "f", "wasserstein")


def modalities(*lead: int, batch: int = 10, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*lead, batch, d, dtype=torch.float64).to(dtype).requires_grad_() for d in (2, 3, 1)]


@pytest.mark.parametrize(("batch", "count"), [(2, 2), (3, 3), (4, 3), (17, 3), (17, 5), (64, 2)])
def test_no_two_modalities_of_a_shuffled_row_share_a_sample(batch: int, count: int) -> None:
    draws = Draws(0)
    for _ in range(20):
        indices = draws.product_indices(batch, count)
        assert torch.equal(indices[0], torch.arange(batch))
        for index in indices:
            assert torch.equal(index.sort().values, torch.arange(batch))
        for a, b in itertools.combinations(indices, 2):
            assert not (a == b).any()


def test_shuffled_rows_are_uniform_over_tuples_of_distinct_samples() -> None:
    draws, counts = Draws(1), torch.zeros(5, 5)
    for _ in range(2000):
        _, second, third = draws.product_indices(5, 3)
        counts[second[0], third[0]] += 1
    expected = torch.full((5, 5), 2000 / 12).fill_diagonal_(0)
    expected[0], expected[:, 0] = 0, 0
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum()
    assert statistic < 31.3  # the 99.9 % quantile of chi^2 with 11 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("measure", MEASURES)
def test_values_and_gradients_are_those_of_the_scores(measure: str, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    critic = JointCritic(6, hidden_dims=(8,), activation="tanh").to(dtype)
    inputs = modalities(*lead, dtype=dtype)
    module = TotalCorrelation(critic, measure, seed=5, penalty=0.0)
    exact = copy.deepcopy(critic).double()
    wide = [t.detach().double().requires_grad_() for t in inputs]
    value, loss = module(*inputs), TotalCorrelation(critic, measure, seed=5, penalty=0.0).learning_loss(*inputs)
    shuffled = [t[..., i, :] for t, i in zip(wide, Draws(5).product_indices(10, 3), strict=True)]
    t, s = (exact.mlp(torch.cat(rows, -1)).squeeze(-1) for rows in (wide, shuffled))
    want = (
        t.mean(-1)
        - {
            "kl": lambda: s.exp().mean(-1).log(),
            "f": lambda: (s - 1).exp().mean(-1),
            "wasserstein": lambda: s.mean(-1),
        }[measure]()
    )
    assert value.shape == lead and value.dtype == dtype
    tolerance = dict(rtol=1e-9, atol=1e-11) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.double(), want, **tolerance)
    torch.testing.assert_close(loss, -value)
    weights = torch.randn(lead, dtype=torch.float64)
    got = torch.autograd.grad((value * weights.to(dtype)).sum(), [*inputs, *critic.parameters()])
    wants = torch.autograd.grad((want * weights).sum(), [*wide, *exact.parameters()])
    for g, w in zip(got, wants, strict=True):
        torch.testing.assert_close(g.double(), w, **tolerance)


def noisy_bits(m: int, flip: float, n: int) -> tuple[Tensor, Tensor]:
    """Counts of the 2^m cells in n samples that realise the joint exactly, and those of the product of marginals."""
    p = torch.zeros(2**m, dtype=torch.float64)
    for cell in range(2**m):
        ones = bin(cell).count("1")
        p[cell] = sum(0.5 * flip**k * (1 - flip) ** (m - k) for k in (ones, m - ones))
    counts = (p * n).round().long()
    assert torch.allclose(counts.double(), p * n)
    return counts, torch.full((2**m,), n // 2**m)


@pytest.mark.parametrize(
    ("m", "flip", "n", "tc", "w1"),
    [
        (2, 0.1, 100, 0.221754, 0.32),
        (2, 0.25, 16, 0.031584, 0.125),
        (3, 0.1, 200, 0.506410, 0.48),
        (3, 0.25, 32, 0.083011, 0.1875),
    ],
)
def test_tables_reach_what_is_known_of_noisy_bits(m: int, flip: float, n: int, tc: float, w1: float) -> None:
    joint, product = noisy_bits(m, flip, n)
    for measure in ("kl", "f"):
        table = torch.zeros(2**m, dtype=torch.float64, requires_grad=True)
        module = TotalCorrelation(JointCritic(m), measure)
        optimizer = torch.optim.LBFGS([table], max_iter=100, line_search_fn="strong_wolfe")

        def estimate(module=module, table=table) -> Tensor:
            return module.estimate(table.repeat_interleave(joint), table.repeat_interleave(product))

        def closure(optimizer=optimizer, estimate=estimate) -> Tensor:
            optimizer.zero_grad()
            loss = -estimate()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert estimate().item() == pytest.approx(tc, abs=1e-6)
        true = (joint.double() / product).log() + (measure == "f")
        with torch.no_grad():
            table.copy_(true)
        assert estimate().item() == pytest.approx(tc, abs=1e-6)
    potential = lipschitz_potential(m, (joint - product).double() / n)
    wasserstein = TotalCorrelation(JointCritic(m), "wasserstein")
    value = wasserstein.estimate(potential.repeat_interleave(joint), potential.repeat_interleave(product))
    assert value.item() == pytest.approx(w1, abs=1e-9)


def lipschitz_potential(m: int, difference: Tensor) -> Tensor:
    """The function on the cube's corners with Lipschitz constant 1 that maximises E_P - E_Q (`difference` is P - Q)."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=m)), dtype=torch.float64)
    pairs = list(itertools.permutations(range(2**m), 2))
    constraints = torch.zeros(len(pairs), 2**m)
    for row, (i, j) in enumerate(pairs):
        constraints[row, i], constraints[row, j] = 1, -1
    limits = [(corners[i] - corners[j]).norm().item() for i, j in pairs]
    found = linprog(-difference.numpy(), A_ub=constraints.numpy(), b_ub=limits, bounds=(-2, 2))
    return torch.from_numpy(found.x)


def test_estimates_of_one_table_are_ordered_and_constants_know_nothing() -> None:
    t, s = torch.randn(2, 40, dtype=torch.float64)
    kl, f, w = (TotalCorrelation(JointCritic(2), m) for m in MEASURES)
    c = 1 - s.exp().mean().log()
    assert f.estimate(t, s) < kl.estimate(t, s)
    torch.testing.assert_close(f.estimate(t + c, s + c), kl.estimate(t, s))
    for c in (-1.0, 1.0, 2.0):
        constant = torch.full((40,), c, dtype=torch.float64)
        assert kl.estimate(constant, constant).item() == pytest.approx(0, abs=1e-14)
        assert w.estimate(constant, constant).item() == 0
        assert f.estimate(constant, constant).item() == pytest.approx(c - math.exp(c - 1), abs=1e-14)


def test_one_shuffle_for_all_modalities_finds_nothing() -> None:
    inputs = modalities(batch=32)
    for _ in range(5):
        critic = JointCritic(6, hidden_dims=(8,)).double()
        values = {m: TotalCorrelation(critic, m, shuffle="together")(*inputs).item() for m in MEASURES}
        assert values["wasserstein"] == pytest.approx(0, abs=1e-15)
        assert values["kl"] <= 1e-15 and values["f"] <= 1e-15
        assert abs(TotalCorrelation(critic, "wasserstein")(*inputs).item()) > 1e-6


class TrueRatio(nn.Module):
    """log p(a, v, l) / (p(a) p(v) p(l)) + c for three d-dimensional standard Gaussians, equicorrelated with rho."""

    def __init__(self, rho: float, d: int, c: float = 0.0):
        super().__init__()
        covariance = torch.full((3, 3), rho, dtype=torch.float64).fill_diagonal_(1)
        self.form = torch.linalg.inv(covariance) - torch.eye(3, dtype=torch.float64)
        self.constant = c - 0.5 * d * torch.logdet(covariance).item()

    def forward(self, z: Tensor) -> Tensor:
        parts = z.unflatten(-1, (3, -1))
        return self.constant - 0.5 * torch.einsum("...id,ij,...jd->...", parts, self.form, parts)


@pytest.mark.parametrize(("rho", "d", "tc"), [(0.3, 4, 0.4867), (0.5, 4, 1.3863)])
def test_three_gaussians_have_their_total_correlation(rho: float, d: int, tc: float) -> None:
    assert -0.5 * d * math.log((1 - rho) ** 2 * (1 + 2 * rho)) == pytest.approx(tc, abs=5e-5)
    mixing = torch.linalg.cholesky(torch.full((3, 3), rho, dtype=torch.float64).fill_diagonal_(1))
    white = torch.randn(32, 2048, 3, d, dtype=torch.float64)
    a, v, l = torch.einsum("ij,gbjd->igbd", mixing, white)  # noqa: E741
    for measure, c in (("kl", 0.0), ("f", 1.0)):
        values = TotalCorrelation(TrueRatio(rho, d, c), measure)(a, v, l)
        assert values.mean().item() == pytest.approx(tc, abs=0.03), measure
        short = TotalCorrelation(TrueRatio(rho, d, c - 1), measure)(a, v, l)
        expected = tc if measure == "kl" else tc - 1 / math.e
        assert short.mean().item() == pytest.approx(expected, abs=0.03), measure
    together = TotalCorrelation(TrueRatio(rho, d), "kl", shuffle="together")(a, v, l)
    assert (together < 0).all()


def test_training_finds_the_total_correlation_of_three_gaussians() -> None:
    rho, d = 0.5, 4
    mixing = torch.linalg.cholesky(torch.full((3, 3), rho).fill_diagonal_(1))

    def sample(n: int) -> list[Tensor]:
        return list(torch.einsum("ij,bjd->ibd", mixing, torch.randn(n, 3, d)))

    module = TotalCorrelation(JointCritic(3 * d, hidden_dims=(64, 64)), "kl")
    optimizer = torch.optim.Adam(module.parameters(), lr=4e-3)
    for _ in range(500):
        loss = module.learning_loss(*sample(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert 1.0 < module(*sample(50_000)).item() < 1.42


def test_gradients_reach_the_inputs_through_both_branches_and_a_fusion_in_the_critic() -> None:
    fusion = nn.Linear(6, 5).double()
    module = TotalCorrelation(nn.Sequential(fusion, nn.Tanh(), JointCritic(5, hidden_dims=(8,)).double()), "kl", seed=3)
    inputs = modalities()
    both = torch.autograd.grad(module(*inputs), [*inputs, fusion.weight])
    joint = torch.autograd.grad(module.critic(torch.cat(inputs, -1)).mean(), [*inputs, fusion.weight])
    for a, b in zip(both, joint, strict=True):
        assert (a - b).norm() > 1e-3 * b.norm() > 0


def test_a_penalty_of_weight_zero_leaves_training_as_it_was_bit_for_bit() -> None:
    def train(weight: float | None) -> list[Tensor]:
        torch.manual_seed(0)
        encoders = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)) for _ in range(3))
        state = torch.get_rng_state()
        module = TotalCorrelation(JointCritic(12, hidden_dims=(8,)), "kl")
        torch.set_rng_state(state)
        optimizer = torch.optim.Adam(encoders.parameters(), lr=1e-2)
        for _ in range(5):
            z = [encoder(torch.randn(16, 4)) for encoder in encoders]
            loss = torch.cat(z, -1).square().mean()
            if weight is not None:
                loss = loss - weight * module(*z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in encoders.parameters()]

    plain, zero, some = train(None), train(0.0), train(0.1)
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, some, strict=True))


class LinearScore(nn.Module):
    def __init__(self, weight: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight


def test_the_gradient_penalty_of_a_linear_score_is_exact_and_reaches_it_alone() -> None:
    critic = LinearScore([1.0, 2.0, 0.0, 0.0, -2.0, 4.0])
    module = TotalCorrelation(critic, "wasserstein", penalty=3.0)
    inputs = modalities(2)
    loss = module.learning_loss(*inputs)
    torch.testing.assert_close(loss, torch.full((2,), 48.0, dtype=torch.float64))
    *of_inputs, of_critic = torch.autograd.grad(loss.sum(), [*inputs, critic.weight])
    assert all(g.abs().max() < 1e-12 for g in of_inputs)
    torch.testing.assert_close(of_critic, 2 * 24 / 5 * critic.weight.detach())
    assert module.gradient_norm_mean.tolist() == pytest.approx([5, 5])
    assert "mean 5.000, max 5.000" in repr(module)
    with torch.no_grad():
        assert not module.learning_loss(*inputs).requires_grad


def test_draws_continue_from_a_checkpoint() -> None:
    critic, inputs = JointCritic(6, hidden_dims=(8,)).double(), modalities()
    first = TotalCorrelation(critic, "kl", seed=1)
    first(*inputs)
    second = TotalCorrelation(critic, "kl", seed=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*inputs), second(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", MEASURES)
def test_scores_of_500_give_finite_values_and_gradients(measure: str, dtype: torch.dtype) -> None:
    module = TotalCorrelation(nn.Identity(), measure)
    for sign in (1, -1):
        t = (500 * sign * torch.tensor([1.0, -1.0, 1.0], dtype=dtype)).requires_grad_()
        for s in (t, -t):
            value = module.estimate(t, s)
            assert value.isfinite() and torch.autograd.grad(value, t)[0].isfinite().all()


def test_bad_inputs_and_settings_are_named() -> None:
    module = TotalCorrelation(JointCritic(6).double())
    a, v, l = modalities()  # noqa: E741
    for arguments, message in [
        ((a,), "modalities must be at least two"),
        ((a, v[:5], l), r"modalities\[1\] must be"),
        ((a[0], v, l), r"modalities\[0\] must be|modalities\[1\] must be"),
        ((a[:2], v[:2], l[:2]), "modalities must hold at least as many samples"),
        ((a, v), "z must be"),
    ]:
        for call in (module, module.learning_loss):
            with pytest.raises(ValueError, match=message):
                call(*arguments)
    with pytest.raises(ValueError, match="critic must return scores"):
        TotalCorrelation(nn.Linear(6, 2).double())(a, v, l)
    with pytest.raises(ValueError, match="measure must be one of"):
        TotalCorrelation(JointCritic(6), "js")
    with pytest.raises(ValueError, match="shuffle must be one of"):
        TotalCorrelation(JointCritic(6), shuffle="never")
    with pytest.raises(ValueError, match="penalty must not be negative"):
        TotalCorrelation(JointCritic(6), penalty=-1.0)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        JointCritic(0)
    with pytest.raises(TypeError, match="critic must map"):
        TotalCorrelation("mlp")  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", ["kl", "f"])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_relabelled_modalities_have_the_same_measure(measure: str, order: tuple[int, ...]) -> None:
    """Reordering the modalities, and the critic's inputs with them, leaves the set of values over many shuffles of four
    samples unchanged."""
    critic, inputs = JointCritic(6, hidden_dims=(8,), activation="tanh").double(), modalities(batch=4)
    places = list(torch.arange(6).split([2, 3, 1]))

    class Relabelled(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            parts = z.split([len(places[k]) for k in order], -1)
            back = torch.empty_like(z)
            for k, part in zip(order, parts, strict=True):
                back[..., places[k]] = part
            return critic(back)

    def values(module: nn.Module, samples: list[Tensor]) -> list[float]:
        with torch.no_grad():
            found = [TotalCorrelation(module, measure, seed=seed)(*samples).item() for seed in range(300)]
        return sorted({round(v, 12) for v in found})

    own, other = values(critic, inputs), values(Relabelled(), [inputs[k] for k in order])
    assert len(own) > 10
    assert other == pytest.approx(own, abs=1e-11)
