"""The first layer applied to both sides separately, against the layer on concatenated pairs."""

import pytest
import torch

from mi_kernels.ops.mlp_critic.first_layer import apart


def draw(lead: tuple[int, ...], grouped: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    own = lead if grouped else ()
    shapes = ((*lead, 4, 3), (*lead, 5, 2), (*own, 6, 5), (*own, 6))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)


@pytest.mark.parametrize(("lead", "grouped"), [((), False), ((2,), False), ((2, 3), False), ((2,), True)])
def test_values_and_both_derivatives(lead: tuple[int, ...], grouped: bool) -> None:
    x, y, weight, bias = tensors = draw(lead, grouped)
    u, v = apart(*tensors)
    pairs = torch.cat([x.unsqueeze(-2).expand(*lead, 4, 5, 3), y.unsqueeze(-3).expand(*lead, 4, 5, 2)], -1)
    w, b = (weight.unsqueeze(-3), bias[..., None, None, :]) if grouped else (weight, bias)
    torch.testing.assert_close(u.unsqueeze(-2) + v.unsqueeze(-3), pairs @ w.mT + b)
    assert torch.autograd.gradcheck(apart, tensors)
    assert torch.autograd.gradgradcheck(apart, tensors)


def test_only_wanted_gradients() -> None:
    x, y, weight, bias = draw((), False)
    u, v = apart(x.detach(), y, weight.detach(), bias)
    (u.sum() + v.sum()).backward()
    assert x.grad is None and weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 5.0))
    torch.testing.assert_close(y.grad, weight[:, 3:].sum(0).expand(5, 2))
