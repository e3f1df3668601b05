"""MFM's regulariser and memory on problems with closed-form values."""

import pytest
import torch
from torch import nn

from models.layers.mfn import MemoryFusion, MFNConfig
from models.mfm.model import prior_distance


def distance(z, seed=0):
    torch.manual_seed(seed)
    return prior_distance({"y": z}, nn.ModuleDict(), sampled=True)


def normal(rows, dim, seed):
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + seed))


@pytest.mark.parametrize("rows, dim", [(32, 32), (128, 80)])
def test_codes_from_the_prior_are_at_the_distance_of_two_finite_samples(rows, dim):
    found = torch.stack([distance(normal(rows, dim, seed), seed) for seed in range(40)])
    wanted = 2 / rows * (1 - (1 + 4 / dim**2) ** (-dim / 2))  # about 4 / (rows dim), because k = 1 on both diagonals
    assert found.mean().item() == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("dim", [32, 256])
def test_a_shift_of_one_in_every_feature_is_two_over_the_width(dim):
    found = distance(normal(512, dim, 1) + 1).item()
    assert found == pytest.approx(2 / dim, rel=0.07)


def test_the_order_of_a_batch_does_not_matter():
    z = normal(16, 5, 1)
    torch.testing.assert_close(distance(z), distance(z.flip(0)), rtol=1e-12, atol=1e-14)


def test_the_gradient_is_the_closed_form():
    rows, dim = 12, 4
    z = normal(rows, dim, 1).requires_grad_()
    (found,) = torch.autograd.grad(distance(z), z)
    torch.manual_seed(0)
    g = torch.randn(1, rows, dim, dtype=torch.float64)[0]

    def pull(other):
        gaps = z[:, None] - other
        return ((-gaps.square().sum(2) / dim**2).exp()[..., None] * gaps).sum(1)

    wanted = 4 / (rows * dim) ** 2 * (pull(g) - pull(z))
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-14)


def test_the_exact_prior_is_the_mean_of_sampled_ones_without_their_diagonal():
    z, dim, rows = normal(64, 8, 2), 8, 64
    sampled = torch.stack([distance(z, seed) for seed in range(200)]).mean().item()
    exact = prior_distance({"y": z}, nn.ModuleDict(), sampled=False).item()
    diagonal = (1 - (1 + 4 / dim**2) ** (-dim / 2)) / rows  # k(g, g) is 1 on the diagonal, not the mean over pairs
    assert sampled == pytest.approx(exact + diagonal, rel=0.03)


def test_without_a_second_layer_the_attention_is_uniform():
    model = MemoryFusion((3, 2), MFNConfig(hidden=(4, 3), memory=5, attention=6, proposal=7, retain=8, update=3)).eval()
    for parameter in model.attention[3].parameters():
        nn.init.zeros_(parameter)
    seen = []
    model.proposal.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    inputs = torch.randn(2, 6, 3), torch.randn(2, 6, 2)
    model(*inputs)
    cells = torch.cat([lstm(x)[1] for lstm, x in zip(model.lstms, inputs, strict=True)], 2)
    torch.testing.assert_close(seen[0][:, 1:, 7:], cells[:, 1:] / 14)
    torch.testing.assert_close(seen[0][:, 1:, :7], cells[:, :-1] / 14)
