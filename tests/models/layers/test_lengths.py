"""`sequence` replaces padding by zeros, and rejects invalid lengths."""

import math

import pytest
import torch

from models.data import Inputs
from models.layers.lengths import last_step, mean_over_steps, same_steps, sequence, steps_within
from tests.models.layers.checks import draw, refilled


def test_padding_becomes_zero_and_passes_no_gradient():
    x = refilled(draw([3, 5, 1], 2), math.nan)
    values = x.values.requires_grad_()
    found = sequence("x", Inputs(values, x.lengths), 2)
    valid = steps_within(x.lengths, 5)
    assert (found.values[~valid] == 0).all() and found.values[valid].isfinite().all()
    found.values.sum().backward()
    assert torch.equal(values.grad, valid[..., None].expand(-1, -1, 2).to(values))


def test_full_lengths_count_as_none():
    assert sequence("x", Inputs(torch.zeros(2, 3, 1), torch.tensor([3, 3]))).lengths is None
    assert sequence("x", torch.zeros(2, 3, 1)).lengths is None


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.uint8])
def test_the_last_step_and_the_mean_are_those_of_each_sequence(kind):
    x = draw([3, 5, 1], 2)
    values, lengths, _ = sequence("x", Inputs(x.values, x.lengths.to(kind)))
    for b, length in enumerate(x.lengths):
        torch.testing.assert_close(last_step(values, lengths)[b], x.values[b, length - 1])
        torch.testing.assert_close(mean_over_steps(values, lengths)[b], x.values[b, :length].mean(0))
    torch.testing.assert_close(mean_over_steps(x.values, None), x.values.mean(1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"x must have values \[batch, steps, features\] with a step, got \(2, 3\)"),
        (torch.zeros(2, 0, 3), "with a step"),
        ([1.0], "got list"),
        (torch.zeros(2, 3, 4), "x must have 5 features per step, got 4"),
        (torch.zeros(2, 3, 5, dtype=torch.int64), "floating type, got torch.int64"),
        (Inputs(torch.zeros(2, 3, 5), torch.tensor([3])), "lengths of x must be 2 integers"),
        (Inputs(torch.zeros(2, 3, 5), torch.tensor([3.0, 1.0])), "lengths of x must be 2 integers"),
        (Inputs(torch.zeros(2, 3, 5), torch.tensor([4, 1])), r"between 0 and 3, got \[4, 1\]"),
        (Inputs(torch.zeros(2, 3, 5), torch.tensor([3, -1])), r"between 0 and 3, got \[3, -1\]"),
    ],
)
def test_what_is_no_sequence_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        sequence("x", x, 5)


def test_a_length_of_zero_is_a_single_step_of_zeros():
    values, lengths, _ = sequence("x", Inputs(torch.full((2, 3, 5), math.nan), torch.tensor([0, 0])), 5)
    assert lengths.tolist() == [1, 1] and (values == 0).all()


def test_aligned_sequences_share_steps_and_lengths():
    x = Inputs(torch.zeros(2, 3, 1), torch.tensor([3, 1]))
    assert same_steps(("a", "b"), [x, x]) is x.lengths
    with pytest.raises(ValueError, match="b must be aligned with a"):
        same_steps(("a", "b"), [x, Inputs(torch.zeros(2, 4, 1))])
    with pytest.raises(ValueError, match="b must have the lengths of a"):
        same_steps(("a", "b"), [x, Inputs(torch.zeros(2, 3, 1), torch.tensor([3, 2]))])
    with pytest.raises(ValueError, match="b must have the lengths of a"):
        same_steps(("a", "b"), [x, Inputs(torch.zeros(2, 3, 1))])
