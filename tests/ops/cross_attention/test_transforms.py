"""Attention under torch.func, forward mode and batched or repeated backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import mi_kernels as mk
from mi_kernels.backends import extension_status
from mi_kernels.ops.cross_attention import reference
from mi_kernels.ops.cross_attention.problem import Pair
from mi_kernels.ops.cross_attention.schema import NO_OFFSET
from tests.ops.transforms_cases import assert_batched_and_repeated_backward, assert_transforms

BACKENDS = ["reference", "chunked", *(["cpu"] if extension_status() == "available" else [])]
LENGTHS = {"query_lengths": torch.tensor([3, 2]), "key_lengths": torch.tensor([4, 0])}
OPTIONS: list[dict[str, Any]] = [
    {},
    LENGTHS,
    {"normalizer": "sparsemax", "causal_offset": 1},
    {"dropout_p": 0.3, "seed": 5, "key_lengths": LENGTHS["key_lengths"]},
]


def plain(options: dict[str, Any]) -> Any:
    none = torch.empty(0, dtype=torch.int64)
    lengths = options.get("query_lengths", none), options.get("key_lengths", none)
    rule = (options.get("causal_offset", NO_OFFSET), 0.5, options.get("dropout_p", 0.0))
    seed, sparse = torch.tensor([options.get("seed", 0)]), options.get("normalizer") == "sparsemax"
    return lambda q, k, v: reference.attention(Pair(q, k, v, *lengths, *rule, seed, sparse))[0]


def sequences(lead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    draw = lambda *shape: torch.randn(*lead, 2, 2, *shape, dtype=torch.float64)  # noqa: E731
    return draw(3, 4), draw(5, 4), draw(5, 3)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "lengths", "sparsemax", "dropout"])
def test_transforms(options: dict[str, Any], backend: str) -> None:
    operator = lambda q, k, v: mk.cross_attention(q, k, v, scale=0.5, backend=backend, **options)  # noqa: E731
    assert_transforms(operator, plain(options), sequences())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "lengths", "sparsemax", "dropout"])
def test_gradients_of_dependent_inputs_do_not_depend_on_how_they_are_asked_for(
    options: dict[str, Any], backend: str
) -> None:
    def call(q: Tensor) -> Tensor:
        k = torch.cat([q.sin(), q.cos()[:, :, :2]], 2)
        return mk.cross_attention(q, k, k[..., :3] * 2, backend=backend, **options)

    assert_batched_and_repeated_backward(call, sequences()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_may_have_lengths_of_its_own(backend: str) -> None:
    q, k, v = sequences((3,))
    lengths = torch.tensor([[4, 0], [1, 5], [2, 2]])
    call = lambda q, k, v, n: mk.cross_attention(q, k, v, key_lengths=n, backend=backend)  # noqa: E731
    torch.testing.assert_close(vmap(call)(q, k, v, lengths), torch.stack([*map(call, q, k, v, lengths)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, [0.2, 0.0]])
def test_several_pairs_under_vmap(dropout: Any, backend: str) -> None:
    q, k, v = sequences((3,))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"dropout_p": dropout, "scale": [0.5, 0.7], "seed": 3, "backend": backend}
        first, second = mk.cross_attention_grouped([q, k], [k, q], [v, q], **options)
        return first.sum() + second.square().sum()

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leaf = q.clone().requires_grad_()
        return torch.autograd.grad(call(leaf, k, v), leaf)[0]

    torch.testing.assert_close(vmap(grad(call))(q, k, v), torch.stack([*map(each, q, k, v)]))


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_weights_are_those_that_met_the_values(normalizer: str) -> None:
    q, k, v = (t.requires_grad_() for t in sequences())
    options: dict[str, Any] = {"normalizer": normalizer, "dropout_p": 0.3, "seed": 1, "causal_offset": 1, **LENGTHS}
    out, weights = mk.cross_attention(q, k, v, **options, return_weights=True)
    assert weights.shape == (2, 2, 3, 5) and (weights == 0).any()
    torch.testing.assert_close(weights @ v, out)
    same, mean = mk.cross_attention(q, k, v, **options, return_weights=True, average_weights=True)
    assert torch.equal(same, out)
    torch.testing.assert_close(mean, weights.mean(1))
    (slope,) = torch.autograd.grad(weights.square().sum(), q)
    assert slope.any()
    half = mk.cross_attention(*(t.detach().bfloat16() for t in (q, k, v)), return_weights=True)
    assert [t.dtype for t in half] == [torch.bfloat16] * 2


def test_averaged_weights_equal_those_of_torch() -> None:
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, y = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 6, 8, dtype=torch.float64)
    keys = torch.tensor([6, 2, 4])
    _, want = module(x, y, y, key_padding_mask=torch.arange(6) >= keys[:, None])
    w_q, w_k, w_v = module.in_proj_weight.chunk(3)
    heads = lambda t, w: (t @ w.T).unflatten(-1, (2, 4)).transpose(1, 2)  # noqa: E731
    q, k, v = heads(x, w_q), heads(y, w_k), heads(y, w_v)
    found = mk.cross_attention(q, k, v, key_lengths=keys, return_weights=True, average_weights=True)[1]
    torch.testing.assert_close(found, want)
