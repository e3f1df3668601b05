"""Leave-one-out, variational upper bound and Barber-Agakov: independent formulas and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mi_kernels as mk
from mi_kernels.bounds.density import gaussian_entropy

KINDS = [mk.LeaveOneOut, mk.VariationalUpperBound, mk.BarberAgakov]


def log_densities(bound: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """log q(y_j | x_i) as [*, i, j], with materialised B x B x D differences."""
    mu, logvar = (t.double() for t in bound.get_mu_logvar(x))  # type: ignore[operator]
    pairs = (y.double().unsqueeze(-3) - mu.unsqueeze(-2)).square() / logvar.exp().unsqueeze(-2)
    return -0.5 * (pairs + logvar.unsqueeze(-2) + math.log(2 * math.pi)).sum(-1)


def leave_one_out(log_q: Tensor) -> Tensor:
    batch = log_q.shape[-1]
    others = log_q.masked_fill(torch.eye(batch, dtype=torch.bool), -torch.inf).logsumexp(-2) - math.log(batch - 1)
    return (log_q.diagonal(dim1=-2, dim2=-1) - others).mean(-1)


@pytest.mark.parametrize("shape", [(2,), (40,), (3, 17)])
def test_leave_one_out_is_the_formula(shape: tuple[int, ...]) -> None:
    bound = mk.LeaveOneOut(4, 5, 6).double()
    x, y = torch.randn(*shape, 4).double().requires_grad_(), torch.randn(*shape, 5).double().requires_grad_()
    got, want = bound(x, y), leave_one_out(log_densities(bound, x, y))
    torch.testing.assert_close(got, want)
    of = [x, y, *bound.parameters()]
    wanted = torch.autograd.grad(want.sum(), of)
    for g, w in zip(torch.autograd.grad(got.sum(), of), wanted, strict=True):
        torch.testing.assert_close(g, w)


def test_leave_one_out_is_below_club_and_not_equal_to_it() -> None:
    """In the public code, an error in the mask's broadcasting makes the two equal."""
    one_out = mk.LeaveOneOut(4, 5, 16).double()
    club = mk.CLUB(4, 5, 16, negatives="others").double()
    club.load_state_dict(one_out.state_dict())
    for _ in range(5):
        x, y = torch.randn(30, 4).double(), 2 * torch.randn(30, 5).double()
        assert one_out(x, y) < club(x, y) - 1e-3


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_leave_one_out_stays_accurate_in_fp32(offset: float) -> None:
    bound = mk.LeaveOneOut(8, 30, 16)
    x, y = torch.randn(60, 8), torch.randn(60, 30) + offset
    with torch.no_grad():
        bound.p_mu[2].bias += offset  # type: ignore[index, operator]
        want = leave_one_out(log_densities(bound, x, y))
        assert abs(bound(x, y) - want) < 2e-5 * abs(want)


def test_leave_one_out_of_an_uninformed_density_is_zero() -> None:
    bound = mk.LeaveOneOut(3, 2, 4).double()
    for p in bound.parameters():
        torch.nn.init.zeros_(p)
    assert abs(bound(torch.randn(12, 3).double(), torch.randn(12, 2).double())) < 1e-13


def test_leave_one_out_is_above_the_mutual_information_of_gaussians() -> None:
    rho, dim = 0.7, 2
    bound = mk.LeaveOneOut(dim, dim, 4)
    bound.get_mu_logvar = lambda x: (rho * x, torch.full_like(x, math.log(1 - rho**2)))  # type: ignore[assignment]
    x = torch.randn(400, 64, dim).double()
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(400, 64, dim).double()
    values = bound(x, y)
    mi, club = -0.5 * dim * math.log(1 - rho**2), dim * rho**2 / (1 - rho**2)
    margin = 4 * values.std() / 20
    assert mi - margin < values.mean() < club + margin
    assert values.mean() < 0.5 * (mi + club)


def test_leave_one_out_keeps_no_matrix_of_pairs() -> None:
    def saved(batch: int) -> int:
        total, seen = 0, set()

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            if t.data_ptr() not in seen:
                seen.add(t.data_ptr())
                total += t.numel() * t.element_size()
            return t

        bound = mk.LeaveOneOut(4, 4, 4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            bound(torch.randn(batch, 4), torch.randn(batch, 4))
        return total

    assert saved(512) <= 4.2 * saved(128)
    assert saved(512) < 512 * 512 * 4


def test_variational_upper_bound_is_torchs_kl_summed_over_dimensions() -> None:
    from torch.distributions import Normal, kl_divergence

    bound = mk.VariationalUpperBound(4, 5, 6).double()
    x, y = torch.randn(3, 7, 4).double(), torch.randn(3, 7, 5).double()
    mu, logvar = bound.get_mu_logvar(x)
    kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1).mean(-1)
    torch.testing.assert_close(bound(x, y), kl)


@pytest.mark.parametrize("mi", [2.0, 10.0])
def test_bounds_meet_the_truth_at_the_true_conditional(mi: float) -> None:
    """Both have expectation I: as p(y) = N(0, I), that is E KL(p(y | x) || N(0, I)), and Barber-Agakov is tight."""
    dim, batch, repeats = 20, 64, 400
    rho = math.sqrt(1 - math.exp(-2 * mi / dim))
    x = torch.randn(repeats, batch, dim).double()
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(repeats, batch, dim).double()
    for kind in (mk.VariationalUpperBound, mk.BarberAgakov):
        bound = kind(dim, dim, 4)
        bound.get_mu_logvar = lambda x: (rho * x, torch.full_like(x, math.log(1 - rho**2)))
        values = bound(x, y)
        assert abs(values.mean() - mi) < 4 * values.std() / math.sqrt(repeats)


def test_gaussian_entropy_is_unbiased() -> None:
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-1.0, 0.3, 3.0]]).double()
    y = torch.randn(4000, 6, 3).double() @ mix.T + 5
    truth = 0.5 * (torch.linalg.slogdet(mix @ mix.T).logabsdet + 3 * math.log(2 * math.pi * math.e))
    values = gaussian_entropy(y)
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(4000)


def test_barber_agakov_takes_the_entropy_of_the_caller() -> None:
    bound, x, y = mk.BarberAgakov(3, 2, 4), torch.randn(5, 9, 3), torch.randn(5, 9, 2)
    log_q = bound.loglikeli(x, y)
    torch.testing.assert_close(bound(x, y, entropy=1.5), log_q + 1.5)
    torch.testing.assert_close(bound(x, y, entropy=torch.arange(5.0)), log_q + torch.arange(5.0))
    torch.testing.assert_close(bound(x, y, entropy=lambda t: t.sum((-2, -1))), log_q + y.sum((-2, -1)))
    torch.testing.assert_close(bound(x, y), log_q + gaussian_entropy(y))
    torch.testing.assert_close(bound.learning_loss(x, y), -log_q)


def test_training_reaches_the_mutual_information() -> None:
    rho, mi = 0.9, -0.5 * math.log(1 - 0.81)
    bound = mk.BarberAgakov(1, 1, 16)
    optimizer = torch.optim.Adam(bound.parameters(), lr=1e-2)
    for _ in range(300):
        x = torch.randn(128, 1)
        loss = bound.learning_loss(x, rho * x + math.sqrt(1 - rho**2) * torch.randn(128, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(4000, 1)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(4000, 1)
    one_out, club = mk.LeaveOneOut(1, 1, 16), mk.CLUB(1, 1, 16)
    for other in (one_out, club):
        other.load_state_dict(bound.state_dict())
    with torch.no_grad():
        assert bound(x, y).item() == pytest.approx(mi, abs=0.06)
        assert mi - 0.06 < one_out(x, y).item() < club(x, y).item()
        assert club(x, y).item() == pytest.approx(0.81 / 0.19, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind: type) -> None:
    module = kind(3, 2, 4)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_inputs_are_named(kind: type) -> None:
    module = kind(3, 2, 4)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for arguments, message in [
        ((x[:5], y), "y must have the batch dimensions of x"),
        ((x[:0], y[:0]), "x must be"),
        ((x, y[0]), "y must be"),
        ((y, x), r"x must be \[\*, batch, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*arguments)
    with pytest.raises(TypeError, match="x must be a tensor"):
        module([1.0], y)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold at least 2 samples for leave-one-out"):
        mk.LeaveOneOut(3, 2, 4)(torch.randn(1, 3), torch.randn(1, 2))
    with pytest.raises(ValueError, match="more samples than dimensions"):
        mk.BarberAgakov(3, 4, 4)(torch.randn(4, 3), torch.randn(4, 4))
    with pytest.raises(ValueError, match="entropy must be a number or have shape"):
        mk.BarberAgakov(3, 2, 4)(torch.randn(5, 3), torch.randn(5, 2), entropy=torch.zeros(3))


def test_gaussian_entropy_under_autocast_is_that_of_its_rounded_samples() -> None:
    y = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = gaussian_entropy(y)
    torch.testing.assert_close(found, gaussian_entropy(y.float()))
