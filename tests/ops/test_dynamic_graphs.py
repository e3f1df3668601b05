"""Compiled graphs of attention, LSTM scans and the concat critic are not specialised to sizes or numbers that
change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mi_kernels as mk

CRITIC = mk.ConcatCritic(3, 2, (6, 5))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def attention(n: int) -> tuple[Any, ...]:
    return leaf(2, 2, n, 4), leaf(2, 2, n + 2, 4), leaf(2, 2, n + 2, 3), torch.tensor([n, 2]), n - 6, 0.1 * n, 0.05 * n


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, offset: int, scale: float, dropout: float) -> Tensor:
    options: dict[str, Any] = {"causal_offset": offset, "scale": scale, "dropout_p": dropout, "seed": 3}
    return mk.cross_attention(q, k, v, key_lengths=lengths, **options)


def clipped(x: Tensor, y: Tensor, clip: float) -> Tensor:
    found = CRITIC.statistics(x, y, ("row_lse", "clipped_row_lse"), clip=clip)
    return torch.stack([t for t in found if t is not None])


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]] = {
    "attention": (attend, attention),
    "critic": (clipped, lambda n: (leaf(n, 3), leaf(n, 2), 0.1 * n)),
    "layer": (lambda *t: mk.lstm(*t)[0], lambda n: (leaf(2, n, 3), leaf(16, 3), leaf(16, 4))),
    "decoder": (
        lambda c, a, b, n: mk.lstm_decode(c, a, b, None, None, n),
        lambda n: (leaf(2, 4), leaf(16, 4), leaf(16, 4), n),
    ),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_all_sizes_and_numbers(name: str) -> None:
    from torch._dynamo.testing import CompileCounter

    function, draw = CASES[name]
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 6, 7):
        arguments = draw(n)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["attention", "critic"])
def test_gradients_of_dynamic_graphs(name: str) -> None:
    function, draw = CASES[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 7):
        arguments = draw(n)
        leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
        found, want = (torch.autograd.grad(f(*arguments).square().sum(), leaves) for f in (compiled, function))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
