"""MFN's memory as a single autograd node, against its steps under autograd."""

import pytest
import torch

from models.layers.gated_memory import GatedMemory, gated_memory

STEPS, ROWS, MEMORY, RETAIN, UPDATE = 5, 4, 3, 6, 2


def problem(dropout):
    generator = torch.Generator().manual_seed(0)
    hidden = RETAIN + UPDATE
    shapes = [(STEPS, ROWS, hidden), (STEPS, ROWS, MEMORY), (MEMORY, hidden)]
    shapes += [(RETAIN, MEMORY), (MEMORY,), (UPDATE, MEMORY), (MEMORY,)]
    given = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    kept = 2.0 * (torch.rand(STEPS, ROWS, hidden, generator=generator, dtype=torch.float64) < 0.5) if dropout else None
    return given, kept


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_values_and_gradients_are_those_of_the_steps(dropout, last):
    given, kept = problem(dropout)
    found, expected = GatedMemory.apply(*given, kept), gated_memory(*given, kept)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    slopes = torch.randn_like(found)
    if last:
        slopes[:-1] = 0
    pairs = (torch.autograd.grad(value, given, slopes) for value in (found, expected))
    for ours, plain in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_rather_than_wrong():
    given, kept = problem(True)
    (slope,) = torch.autograd.grad(GatedMemory.apply(*given, kept).square().sum(), given[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
