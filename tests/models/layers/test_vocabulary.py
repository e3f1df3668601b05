"""Cross entropy over a vocabulary against plain torch: values, gradients, blocks, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.layers.vocabulary import vocabulary_cross_entropy


def case(tokens=13, hidden=6, words=17, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((tokens, hidden), (words, hidden), (words,))
    parts = [(3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]
    return (*parts, torch.randint(words, (tokens,)))


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("block", [1, 17, 40, 1 << 22])
def test_value_and_gradients_are_plain_torchs(block):
    h, weight, bias, target = case()
    found = vocabulary_cross_entropy(h, weight, bias, target, block=block)
    want = F.cross_entropy(F.linear(h, weight, bias), target)
    torch.testing.assert_close(found, want)
    # Differentiate a function of the loss, so that the incoming gradient is not 1.
    for mine, theirs in zip(
        gradients(found.log(), h, weight, bias), gradients(want.log(), h, weight, bias), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradients_pass_gradcheck():
    h, weight, bias, target = case(tokens=5, hidden=3, words=4)
    assert torch.autograd.gradcheck(lambda *x: vocabulary_cross_entropy(*x, target, block=8), (h, weight, bias))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_asked_for(needed):
    h, weight, bias, target = case()
    inputs = [t.detach().requires_grad_(index in needed) for index, t in enumerate((h, weight, bias))]
    vocabulary_cross_entropy(*inputs, target, block=20).backward()
    want = F.cross_entropy(F.linear(h, weight, bias), target)
    for index, full in enumerate(gradients(want, h, weight, bias)):
        if index in needed:
            torch.testing.assert_close(inputs[index].grad, full)
        else:
            assert inputs[index].grad is None


def test_large_logits_stay_finite():
    h, weight, bias, target = case(dtype=torch.float32)
    found = vocabulary_cross_entropy(h * 1e4, weight, bias, target)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(h * 1e4, weight, bias), target))


def test_sixteen_bits_sum_in_single_precision():
    """The gradient is more accurate than a sum over blocks in bf16 could be."""
    h, weight, bias, target = case(tokens=600, hidden=4, words=5, dtype=torch.bfloat16)
    found = vocabulary_cross_entropy(h, weight, bias, target, block=5)
    exact = [t.detach().double().requires_grad_() for t in (h, weight, bias)]
    want = F.cross_entropy(F.linear(*exact), target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-2, atol=0)
    of_bias = gradients(found, bias)[0].double()
    torch.testing.assert_close(of_bias, gradients(want, exact[2])[0], rtol=2e-2, atol=1e-3)


def test_logits_of_all_tokens_never_exist():
    """No tensor that an operator returns is larger than a block; the logits would have 64 x 512 elements."""
    h, weight, bias, target = case(tokens=64, hidden=4, words=512, dtype=torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor))
            return found

    with Watch():
        vocabulary_cross_entropy(h, weight, bias, target, block=2048).backward()
    assert max(sizes) <= 2048 < 64 * 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 3, 6)}, "h must have shape"),
        ({"h": torch.zeros(0, 6)}, "with a token"),
        ({"weight": torch.zeros(17, 5)}, r"weight must have shape \[vocabulary, 6\]"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[17\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "one token per row"),
        ({"target": torch.full((13,), 17)}, "between 0 and 16, got 17"),
        ({"block": 0}, "block must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    names = ("h", "weight", "bias", "target")
    given = dict(zip(names, case(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        vocabulary_cross_entropy(**given)


def test_targets_must_be_integers():
    h, weight, bias, target = case()
    with pytest.raises(TypeError, match="target must be int64"):
        vocabulary_cross_entropy(h, weight, bias, target.double())
