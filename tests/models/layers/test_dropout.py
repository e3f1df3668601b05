"""Our dropout behaves like torch's: the same rate and scale, and only in training."""

import pytest
import torch

from models.layers.dropout import SMALL, Dropout, dropout, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_masks_have_the_rate_and_keep_the_mean(rate, dtype):
    torch.manual_seed(0)
    number = 400_003  # the last random word is used only in part
    found = mask(torch.empty(number, dtype=dtype), rate)
    assert found.dtype == dtype
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate), dtype=dtype).item()}
    share = (found == 0).double().mean().item()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / number) ** 0.5
    pairs = ((found[1:] == 0) & (found[:-1] == 0)).double().mean().item()
    assert abs(pairs - rate**2) < 10 * (rate / number) ** 0.5  # neighbours, which share a random word, are independent


@pytest.mark.parametrize("number", [SMALL - 1, 2 * SMALL])
def test_the_module_acts_in_training_and_repeats_a_seed(number):
    x, module = torch.randn(number, requires_grad=True), Dropout(0.5)
    assert module.eval()(x) is x and dropout(x, 0.0) is x
    module.train()
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first) and not torch.equal(module(x), first)
    (slope,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(slope, torch.where(first == 0, 0.0, 2.0)) and torch.equal(first, x * slope)
