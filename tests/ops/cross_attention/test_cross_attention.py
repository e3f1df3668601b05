"""Attention between sequences: every backend against a formula that slices instead of masking; the operator's
contract."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk
from mi_kernels.backends import extension_status
from mi_kernels.ops.cross_attention import dispatch, reference
from mi_kernels.ops.cross_attention.problem import OperatorRule, Pairs
from mi_kernels.ops.cross_attention.schema import NO_OFFSET

needs_extension = pytest.mark.skipif(extension_status() != "available", reason="the extension is not built")
BACKENDS = ["reference", "chunked", pytest.param("cpu", marks=needs_extension)]
KERNELS = BACKENDS[1:]
NORMALIZERS = ["softmax", "sparsemax"]
SHAPES = [  # batch, heads, Tq, Tk, E, Ev
    (1, 1, 1, 1, 1, 1),
    (3, 2, 7, 5, 4, 4),
    (2, 1, 1, 19, 4, 3),
    (2, 2, 23, 1, 2, 4),
    (2, 2, 17, 64, 5, 6),
    (3, 1, 67, 131, 4, 4),
    (2, 1, 33, 40, 7, 8),
    (2, 1, 16, 37, 16, 10),
    (2, 1, 71, 66, 17, 3),
    (2, 1, 5, 130, 4, 31),
    (1, 2, 65, 70, 64, 64),
    (1, 1, 13, 67, 256, 200),
]


def python_hash(seed: int, head: int, i: int, j: int) -> int:
    """The dropout hash, written with Python integers."""
    word = 2**32 - 1

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) & word
        x = ((x ^ x >> 15) * 0x846CA68B) & word
        return x ^ x >> 16

    k = mix((mix(mix(seed & word) ^ (seed >> 32 & word)) + head) & word)
    r1 = mix((k + i) & word)
    r2 = mix(k ^ r1)
    x = (r1 + 0x9E3779B9 * j) & word
    x = (((x ^ x >> 16) * 0x7FEB352D) & word) ^ r2
    x = ((x ^ x >> 15) * 0x846CA68B) & word
    return x ^ x >> 16


def bisected_sparsemax(s: Tensor) -> Tensor:
    """Sparsemax of one row: bisection finds the support, from which the threshold is computed exactly."""
    low, high = s.detach().max() - 1, s.detach().max()
    for _ in range(80):
        middle = (low + high) / 2
        above = (s.detach() - middle).clamp(min=0).sum() > 1
        low, high = (middle, high) if above else (low, middle)
    support = s.detach() > low
    return torch.where(support, s - (s[support].sum() - 1) / support.sum(), 0.0)


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_offset: int | None = None,
    normalizer: str = "softmax",
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Attention row by row, over the keys that the row may attend to."""
    batch, heads, length, features = q.shape
    items = []
    for b, h in itertools.product(range(batch), range(heads)):
        n = length if query_lengths is None else int(query_lengths[b])
        m = k.shape[2] if key_lengths is None else int(key_lengths[b])
        rows = []
        for i in range(length):
            end = m if causal_offset is None else max(0, min(m, i + causal_offset + 1))
            if i >= n or end == 0:
                rows.append(0 * (v[b, h, 0] + q[b, h, 0].sum() + k[b, h, 0].sum()))
                continue
            s = (k[b, h, :end] @ q[b, h, i]) * (features**-0.5 if scale is None else scale)
            p = s.softmax(0) if normalizer == "softmax" else bisected_sparsemax(s)
            if dropout_p:
                hashes = [python_hash(seed, b * heads + h, i, j) for j in range(end)]
                p = p * torch.tensor([x >= int(dropout_p * 2**32) for x in hashes]) / (1 - dropout_p)
            rows.append(p @ v[b, h, :end])
        items.append(torch.stack(rows))
    return torch.stack(items).view(batch, heads, length, v.shape[3])


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    b, h, tq, tk, e, ev = shape
    q, k, v = torch.randn(b, h, tq, e), torch.randn(b, h, tk, e), torch.randn(b, h, tk, ev)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def lengths_of(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Lengths that are full, short and, for the third item's keys, 0."""
    b, _, tq, tk, *_ = shape
    query = torch.tensor([tq, max(1, tq // 2), tq][:b])
    key = torch.tensor([tk - tk // 3, max(1, tk // 2), 0][:b])
    return {"query_lengths": query, "key_lengths": key}


def values_and_gradients(function: Any, tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def cases(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    lengths = lengths_of(shape)
    return [
        {},
        lengths,
        {"causal_offset": abs(shape[3] - shape[2])},
        {"causal_offset": -2, "scale": 1.7},
        {"causal_offset": 0, "dropout_p": 0.4, "seed": -5 << 33, **lengths},
    ]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_equals_the_sliced_formula(shape: tuple[int, ...], normalizer: str) -> None:
    if shape[2] * shape[3] > 1500:
        pytest.skip("slow row by row; the other backends are compared with the definition")
    for options in cases(shape):
        options |= {"normalizer": normalizer}
        tensors = problem(shape)
        found = values_and_gradients(mk.cross_attention, tensors, backend="reference", **options)
        for a, b in zip(found, values_and_gradients(expected, tensors, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_definition(
    shape: tuple[int, ...], normalizer: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BLOCK_BYTES", 1 << 12)
    tensors = problem(shape)
    for options in cases(shape):
        options |= {"normalizer": normalizer}
        want = values_and_gradients(mk.cross_attention, tensors, backend="reference", **options)
        found = values_and_gradients(mk.cross_attention, tensors, backend=backend, **options)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] > 1])
def test_error_is_at_most_twice_that_of_plain_torch(
    shape: tuple[int, ...], dtype: torch.dtype, normalizer: str, backend: str
) -> None:
    tensors = problem(shape, dtype)
    for options in cases(shape)[1:]:
        options |= {"normalizer": normalizer}
        exact = values_and_gradients(
            mk.cross_attention, tuple(t.double() for t in tensors), backend="reference", **options
        )
        plain = values_and_gradients(mk.cross_attention, tensors, backend="reference", **options)
        found = values_and_gradients(mk.cross_attention, tensors, backend=backend, **options)
        # If a row has very few keys, dq and dk are differences of nearly equal numbers that are as large as dv.
        size = max(e.norm() for e in exact)
        for f, p, e in zip(found, plain, exact, strict=True):
            assert f.dtype == dtype
            assert (f.double() - e).norm() <= 2 * (p.double() - e).norm() + 1e-6 * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("features", [4, 40])
def test_padding_is_never_read(features: int, normalizer: str, backend: str) -> None:
    shape = (3, 2, 9, 21, features, features)
    lengths, tensors = lengths_of(shape), problem(shape, torch.float32)
    want = values_and_gradients(mk.cross_attention, tensors, normalizer=normalizer, backend=backend, **lengths)
    q, k, v = (t.clone() for t in tensors)
    for b in range(3):
        q[b, :, lengths["query_lengths"][b] :] = torch.nan
        k[b, :, lengths["key_lengths"][b] :] = torch.inf
        v[b, :, lengths["key_lengths"][b] :] = torch.nan
    found = values_and_gradients(mk.cross_attention, (q, k, v), normalizer=normalizer, backend=backend, **lengths)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)
    out, dq, dk, dv = found
    assert not out[1, :, 4:].any() and not dq[1, :, 4:].any() and not out[2].any()
    assert not dk[1, :, 10:].any() and not dv[1, :, 10:].any() and not dk[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_a_nan_among_the_keys_shows_where_it_is_seen(normalizer, size, backend):
    q, k, v = torch.randn(2, 3, 37, size), torch.randn(2, 3, 45, size), torch.randn(2, 3, 45, size)
    clean = mk.cross_attention(q, k, v, causal_offset=0, normalizer=normalizer, backend=backend)
    k[0, 1, 20, 0] = torch.nan
    out = mk.cross_attention(q, k, v, causal_offset=0, normalizer=normalizer, backend=backend)
    assert out[0, 1, 20:].isnan().all()
    out[0, 1, 20:] = clean[0, 1, 20:]
    torch.testing.assert_close(out, clean)
    q[1, 2, 7, 0] = torch.nan  # makes every score of this row NaN
    again = mk.cross_attention(q, k, v, causal_offset=0, normalizer=normalizer, backend=backend)
    assert again[1, 2, 7].isnan().all()
    again[1, 2, 7] = clean[1, 2, 7]
    torch.testing.assert_close(again[1], clean[1])
    q[1, 2, 7, 0] = 0.0
    k[0, 1, 20, 0] = torch.inf  # scores of +inf and -inf
    towards = mk.cross_attention(q, k, v, normalizer=normalizer, backend=backend)[0, 1, q[0, 1, :, 0] > 0]
    assert not towards.isfinite().any()



@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("features", [4, 40])
def test_rows_without_a_key_are_zero(features: int, normalizer: str, backend: str) -> None:
    tensors = problem((2, 1, 20, 6, features, features), torch.float32)
    out, dq, *_ = values_and_gradients(
        mk.cross_attention, tensors, causal_offset=-18, normalizer=normalizer, backend=backend
    )
    assert not out[:, :, :18].any() and not dq[:, :, :18].any()
    torch.testing.assert_close(out[:, :, 18], tensors[2][:, :, 0])
    nothing = values_and_gradients(
        mk.cross_attention, tensors, causal_offset=-20, normalizer=normalizer, backend=backend
    )
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [4, 40])
def test_large_scores_neither_overflow_nor_vanish(features: int, backend: str) -> None:
    q, k, v = problem((2, 2, 18, 35, features, 4), torch.float32)
    for shift in (0.0, -1e4, 300.0):
        moved = q * 100 + shift / features
        found = mk.cross_attention(moved, k.abs() + 0.5, v, scale=1.0, backend=backend)
        want = F.scaled_dot_product_attention(moved.double(), k.double().abs() + 0.5, v.double(), scale=1.0)
        torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_equals_torch(backend: str) -> None:
    q, k, v = problem((2, 3, 11, 13, 4, 4))
    keys = torch.tensor([13, 6])
    mask = (torch.arange(13) < keys[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(mk.cross_attention(q, k, v, key_lengths=keys.int(), backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [4, 40])
def test_sparsemax_of_equal_scores_and_of_one_that_wins(features: int, backend: str) -> None:
    q, k = torch.ones(1, 1, 3, features), torch.zeros(1, 1, 5, features)
    v = torch.randn(1, 1, 5, 7)
    even = mk.cross_attention(q, k, v, normalizer="sparsemax", backend=backend)
    torch.testing.assert_close(even, v.mean(2, keepdim=True).expand(-1, -1, 3, -1))
    k[0, 0, 2] = 10.0
    won = mk.cross_attention(q, k, v, normalizer="sparsemax", backend=backend)
    torch.testing.assert_close(won, v[:, :, 2:3].expand(-1, -1, 3, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e15), (torch.float32, 3e4), (torch.float64, 1e30)])
@pytest.mark.parametrize(("length", "features"), [(5, 4), (70, 9), (40, 64)])
def test_sparsemax_of_scores_beyond_which_tau_is_rounded_off(length, features, dtype, size, backend: str) -> None:
    gen = torch.Generator().manual_seed(features)
    q, k, v, g = (torch.randn(1, 2, length, features, generator=gen, dtype=dtype) for _ in range(4))
    q, k, v = (t.requires_grad_() for t in (q * size, k * size, v))
    out = mk.cross_attention(q, k, v, normalizer="sparsemax", backend=backend)
    winner = (q @ k.mT).argmax(-1)  # scores differ by more than 1: one key gets all weight, and score gradients are 0
    chosen = v.gather(2, winner[..., None].expand_as(q))
    assert torch.equal(out, chosen)
    found, (dv,) = torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(chosen, v, g)
    assert (found[0] == 0).all() and (found[1] == 0).all()
    torch.testing.assert_close(found[2], dv)


def test_dropout_hash_equals_integers_in_python_and_drops_at_its_rate() -> None:
    rows = torch.tensor([0, 3, 11])
    for seed in (0, 7, -1, 2**62 + 12345):
        found = reference.dropout_hash(torch.tensor(seed), 2, 3, rows, 5)
        for b, h, (n, i), j in itertools.product(range(2), range(3), enumerate(rows.tolist()), range(5)):
            assert int(found[b, h, n, j]) == python_hash(seed, b * 3 + h, i, j)
    factor = reference.dropout_factor(torch.tensor(3), 0.3, 4, 4, torch.arange(100), 100, torch.float64)
    dropped = (factor == 0).double()
    assert abs(dropped.mean() - 0.3) < 0.005
    # Dropping is independent between neighbouring rows, keys, heads and items.
    for dim in range(4):
        n = dropped.shape[dim] - 1
        both = (dropped.narrow(dim, 0, n) * dropped.narrow(dim, 1, n)).mean()
        assert abs(both - 0.09) < 0.005


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("features", [4, 40])
def test_what_is_dropped_is_the_hash_bit_for_bit(features: int, backend: str) -> None:
    q, k = torch.zeros(2, 2, 19, features), torch.zeros(2, 2, 37, features)
    v = torch.eye(37).expand(2, 2, 37, 37).contiguous() if features == 40 else None
    want = reference.dropout_factor(torch.tensor(99), 0.25, 2, 2, torch.arange(19), 37, torch.float32) > 0
    if v is not None:
        out = mk.cross_attention(q, k, v, dropout_p=0.25, seed=99, backend=backend)
        assert torch.equal(out > 0, want)
        return
    for first in range(0, 37, 4):  # values of four features reveal four weights at a time
        v = torch.eye(37, 40)[:, first : first + 4].expand(2, 2, 37, 4)
        out = mk.cross_attention(q, k, v, dropout_p=0.25, seed=99, backend=backend)
        assert torch.equal(out[..., : 37 - first] > 0, want[..., first : first + 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_follows_seeds(backend: str) -> None:
    q, k, v = problem((2, 2, 9, 21, 4, 4))
    call = lambda **o: mk.cross_attention(q, k, v, dropout_p=0.5, backend=backend, **o)  # noqa: E731
    assert torch.equal(call(seed=4), call(seed=torch.tensor(4)))
    assert not torch.equal(call(seed=4), call(seed=5))
    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call()) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_pairs_in_one_call_equal_a_call_for_each(normalizer: str, backend: str) -> None:
    shapes = [(2, 3, 9, 21, 4, 4), (2, 3, 21, 9, 4, 4), (1, 2, 5, 70, 40, 3), (4, 1, 17, 17, 6, 8)]
    tensors = [t for shape in shapes for t in problem(shape, torch.float32)]
    rules: dict[str, Any] = {
        "query_lengths": [None, torch.tensor([3, 20]), None, None],
        "key_lengths": [torch.tensor([21, 2]), None, None, torch.tensor([1, 17, 0, 5])],
        "causal_offset": [None, 12, 65, 0],
        "dropout_p": [0.0, 0.3, 0.1, 0.0],
        "scale": [None, None, 1.0, 0.3],
    }

    def run(function: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        outs = function(leaves[0::3], leaves[1::3], leaves[2::3])
        return [*outs, *torch.autograd.grad(sum((o.sin()).sum() for o in outs), leaves)]

    def apart(queries: list, keys: list, values: list) -> list[Tensor]:
        return [
            mk.cross_attention(
                *(queries[n], keys[n], values[n]),
                **{name: rule[n] for name, rule in rules.items()},
                normalizer=normalizer,
                seed=31 + n,
                backend=backend,
            )
            for n in range(4)
        ]

    def together(queries: list, keys: list, values: list) -> list[Tensor]:
        return mk.cross_attention_grouped(
            queries, keys, values, **rules, normalizer=normalizer, seed=31, backend=backend
        )

    for a, b in zip(run(together), run(apart), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_serves_all_pairs_and_a_tensor_may_serve_twice(backend: str) -> None:
    x = torch.randn(2, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    options = {"causal_offset": 1, "scale": 0.7, "backend": backend}
    first, second = mk.cross_attention_grouped([x, x], [x, x], [x, 2 * x], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(second, 2 * first)
    (found,) = torch.autograd.grad((first + second).sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(3 * mk.cross_attention(x, x, x, **options).sum(), x)  # type: ignore[arg-type]
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    q = torch.randn(2, 9, 3, 4, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(3, 4, 2, 7, dtype=torch.float64).permute(2, 0, 3, 1)
    v = torch.randn(1, 1, 1, 10, dtype=torch.float64)[..., ::2].expand(2, 3, 7, 5)
    want = values_and_gradients(mk.cross_attention, tuple(t.contiguous() for t in (q, k, v)), backend="reference")
    found = mk.cross_attention(q, k, v, backend=backend)
    torch.testing.assert_close(found, want[0])
    leaf = q.detach().requires_grad_()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = mk.cross_attention(leaf, k, v, backend=backend)
    out.backward(weights.transpose(1, 2).contiguous().transpose(1, 2))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want[1])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_and_second_derivatives(normalizer: str, backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in problem((2, 1, 5, 4, 3, 2)))
    lengths = {"query_lengths": torch.tensor([5, 3]), "key_lengths": torch.tensor([4, 2])}

    def call(*tensors: Tensor) -> Tensor:
        options = {"causal_offset": 1, "dropout_p": 0.2, "seed": 1, "normalizer": normalizer, "backend": backend}
        return mk.cross_attention(*tensors, **lengths, **options)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


@pytest.mark.parametrize("backend", KERNELS)
def test_frozen_inputs_get_no_gradient(backend: str) -> None:
    q, k, v = problem((2, 1, 5, 4, 3, 2))
    k.requires_grad_()
    (found,) = torch.autograd.grad(mk.cross_attention(q, k, v, backend=backend).square().sum(), k)
    (want,) = torch.autograd.grad(mk.cross_attention(q, k, v, backend="reference").square().sum(), k)
    torch.testing.assert_close(found, want)


def saved_bytes(length: int, backend: str) -> int:
    leaves = [t.requires_grad_() for t in problem((2, 2, length, length, 4, 4), torch.float32)]
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = mk.cross_attention(*leaves, dropout_p=0.1, backend=backend)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("backend", KERNELS)
def test_memory_kept_for_backward_is_linear_in_the_length(backend: str) -> None:
    small, middle, large = (saved_bytes(length, backend) for length in (64, 128, 192))
    assert large - middle == middle - small == 64 * 4 * (4 * 4 * 4 + 4)  # query, key, value, out and a statistic


@needs_extension
@pytest.mark.parametrize("features", [4, 40])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_two_runs_agree_bit_for_bit_with_any_number_of_threads(normalizer: str, features: int) -> None:
    tensors = problem((4, 3, 50, 61, features, features), torch.float32)
    options = {"normalizer": normalizer, "dropout_p": 0.2, "seed": 8, "backend": "cpu"}
    first = values_and_gradients(mk.cross_attention, tensors, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        second = values_and_gradients(mk.cross_attention, tensors, **options)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_operators_pass_opcheck(sparse: bool, backend: str) -> None:
    query, key = (
        [torch.randn(2, 2, 5, 4), torch.randn(1, 1, 3, 20)],
        [torch.randn(2, 2, 7, 4), torch.randn(1, 1, 2, 20)],
    )
    value = [torch.randn(2, 2, 7, 3), torch.randn(1, 1, 2, 1)]
    none = torch.empty(0, dtype=torch.int64)
    lengths = ([torch.tensor([5, 2]), none], [none, torch.tensor([1])])
    pairs = Pairs(query, key, value, *lengths, torch.tensor([3, 4]))
    rule = (*OperatorRule([NO_OFFSET, 1], torch.tensor([[0.5, 1.0], [0.1, 0.0]]), sparse), backend)
    ops = torch.ops.mi_kernels
    torch.library.opcheck(ops.cross_attention_forward.default, (*pairs, *rule))
    found = ops.cross_attention_forward(*pairs, *rule)
    assert [t.dtype for t in found] == [torch.float32] * 4
    given = ([t + 1 for t in found[:2]], *pairs, found[:2], found[2:], *rule)
    torch.library.opcheck(ops.cross_attention_backward.default, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    leaves = [t.requires_grad_() for t in problem((2, 2, 5, 7, 4, 4))]

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        first, second = mk.cross_attention_grouped(
            [q, k], [k, q], [v, q], key_lengths=[lengths, None], causal_offset=2, dropout_p=0.2, seed=3, backend=backend
        )
        return first.square().mean() + mk.cross_attention(second, q, q, normalizer="sparsemax", backend=backend).sum()

    lengths = torch.tensor([7, 3])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves, lengths), call(*leaves, lengths))
    found = torch.autograd.grad(compiled(*leaves, lengths), leaves)
    for a, b in zip(found, torch.autograd.grad(call(*leaves, lengths), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_attends_in_its_dtype(backend: str) -> None:
    q, k, v = problem((2, 2, 5, 7, 4, 4), torch.float32)
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = mk.cross_attention(q, k.bfloat16(), v, backend=backend)
    assert found.dtype == torch.bfloat16
    want = mk.cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="reference")
    torch.testing.assert_close(found, want)
    (gradient,) = torch.autograd.grad(found.float().sum(), q)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_keys_changes_nothing(backend: str) -> None:
    q, k, v = problem((2, 2, 5, 37, 4, 4))
    order = torch.randperm(37)
    for normalizer in NORMALIZERS:
        before = mk.cross_attention(q, k, v, normalizer=normalizer, backend=backend)
        after = mk.cross_attention(q, k[:, :, order], v[:, :, order], normalizer=normalizer, backend=backend)
        torch.testing.assert_close(before, after)


def arguments() -> dict[str, Any]:
    return {"query": torch.zeros(2, 3, 5, 4), "key": torch.zeros(2, 3, 7, 4), "value": torch.zeros(2, 3, 7, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 5, 4)}, r"query must have shape \[batch, heads, Tq, head size\]"),
        ({"query": torch.zeros(2, 3, 0, 4)}, "query must have shape .* not be empty"),
        ({"key": torch.zeros(2, 3, 0, 4)}, "key must have shape .* not be empty"),
        ({"value": torch.zeros(2, 3, 7, 0)}, "value must have shape .* not be empty"),
        ({"query": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, "query must be float64"),
        ({"key": torch.zeros(2, 3, 7, 5)}, r"key must have the batch, heads and head size of query \(2, 3, 5, 4\)"),
        ({"key": torch.zeros(2, 1, 7, 4)}, "key must have the batch, heads and head size"),
        ({"value": torch.zeros(2, 3, 6, 6)}, r"value must have the batch, heads and length of key \(2, 3, 7, 4\)"),
        ({"value": torch.zeros(2, 3, 7, 6, dtype=torch.float64)}, "value must have the dtype of query"),
        ({"key": torch.zeros(2, 3, 7, 4, device="meta")}, "key must be on the device of query"),
        ({"query_lengths": torch.tensor([1, 2, 3])}, r"query_lengths must have shape \[items of query\] = \[2\]"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, "key_lengths must be of an integer type"),
        ({"key_lengths": torch.tensor([1, 8])}, "key_lengths must lie between 0 and the length of key = 7, got 1 to 8"),
        ({"query_lengths": torch.tensor([-1, 5])}, "query_lengths must lie between 0 and the length of query = 5"),
        ({"normalizer": "entmax"}, "normalizer must be one of 'softmax', 'sparsemax'"),
        ({"dropout_p": 1.0}, r"dropout_p must be a number in \[0, 1\)"),
        ({"dropout_p": -0.1}, "dropout_p must be"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be an integer or one int64"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.cross_attention(**(arguments() | change))


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="key must be a tensor, got list"):
        mk.cross_attention(**(arguments() | {"key": [1.0]}))
    with pytest.raises(TypeError, match="key_lengths must be a tensor or None, got list"):
        mk.cross_attention(**arguments(), key_lengths=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="causal_offset must be an integer, got float"):
        mk.cross_attention(**arguments(), causal_offset=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="values must be a list, one entry per pair, got Tensor"):
        mk.cross_attention_grouped([torch.zeros(2, 3, 5, 4)], [torch.zeros(2, 3, 7, 4)], torch.zeros(2, 3, 7, 6))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": []}, "queries must be a list of at least one tensor"),
        ({"keys": [torch.zeros(2, 3, 7, 4)]}, "keys must have one entry per pair, 2, got 1"),
        ({"values": [torch.zeros(2, 3, 7, 6), torch.zeros(2, 3, 5, 6)]}, r"values\[1\] must have .* of keys\[1\]"),
        ({"queries": [torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4).half()]}, r"queries\[1\] must have the dtype"),
        ({"key_lengths": [None]}, "key_lengths must have one entry per pair"),
        ({"key_lengths": [None, torch.tensor([9, 1])]}, r"key_lengths\[1\] must lie between 0 and"),
        ({"dropout_p": [0.1, 2.0]}, r"dropout_p\[1\] must be"),
        ({"scale": [0.1]}, "scale must have one entry per pair"),
    ],
)
def test_bad_lists_are_named(change: dict[str, Any], message: str) -> None:
    single = arguments()
    lists = {"queries": [single["query"]] * 2, "keys": [single["key"]] * 2, "values": [single["value"]] * 2}
    with pytest.raises(ValueError, match=message):
        mk.cross_attention_grouped(**(lists | change))


