"""The MLP critic: chunks of rows against the materialised definition in fp64; the operators' contract."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mi_kernels.backends import extension_status
from mi_kernels.ops.common.statistics import STATISTICS
from mi_kernels.ops.mlp_critic import api, dispatch
from mi_kernels.ops.mlp_critic.activations import ACTIVATIONS
from mi_kernels.ops.mlp_critic.schema import COL_LSE, OUTPUTS, ROW_LSE, kept_shapes

BACKENDS = ["chunked", *(["cpu"] if extension_status() == "available" else [])]

TINY = 600  # a memory budget in bytes: one or two rows of the shapes below
SHAPES = [  # groups, B, N, grouped weights
    (None, 1, 1, False),
    (None, 2, 2, False),
    (None, 13, 13, False),
    (3, 5, 5, True),
    (2, 6, 6, False),
    (1, 4, 4, True),
    (None, 3, 11, False),
    (2, 7, 1, True),
]
HIDDEN = [(5,), (4, 6), (3, 4, 5)]


def problem(
    groups: int | None,
    b: int,
    n: int,
    grouped: bool,
    hidden: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], int]:
    """The inputs [x, y, weights..., biases...], and the number of layers."""
    lead = () if groups is None else (groups,)
    own = lead if grouped else ()
    x, y = torch.randn(*lead, b, 3, dtype=dtype), torch.randn(*lead, n, 2, dtype=dtype)
    widths = [5, *hidden, 1]
    weights = [torch.randn(*own, o, i, dtype=dtype) / i**0.5 for i, o in pairwise(widths)]
    biases = [torch.randn(*own, o, dtype=dtype) / 10 for o in widths[1:]]
    return [x, y, *weights, *biases], len(weights)


def run(tensors: list[Tensor], layers: int, **options: object) -> list[Tensor]:
    x, y, *rest = tensors
    square = x.shape[-2] == y.shape[-2]
    options.setdefault("stats", STATISTICS if square else STATISTICS[1:])
    options.setdefault("clip", 0.1)
    found = api.statistics(x, y, rest[:layers], rest[layers:], **options)  # type: ignore[arg-type]
    return [t for t in found if t is not None]


def values_and_gradients(tensors: list[Tensor], layers: int, **options: object) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    found = run(leaves, layers, **options)
    differentiable = [t for t in found if t.requires_grad]
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (
            t.where(t.isfinite(), t.detach() * 0)
            * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        ).nansum()
        for t in differentiable
    )
    return found + list(torch.autograd.grad(total, leaves))  # type: ignore[arg-type]


needs_extension = pytest.mark.skipif(extension_status() != "available", reason="the extension is not built")


@pytest.mark.usefixtures("two_threads")
@needs_extension
@pytest.mark.parametrize("pairs", ["all", "off_diagonal"])
@pytest.mark.parametrize("hidden", HIDDEN[:2])
@pytest.mark.parametrize("shape", [*SHAPES, (None, 65, 65, False), (2, 3, 130, True), (3, 20, 20, False)])
def test_compiled_kernels_equal_the_definition(shape: tuple, hidden: tuple[int, ...], pairs: str) -> None:
    if pairs == "off_diagonal" and shape[1] != shape[2]:
        pytest.skip("off-diagonal pairs need a square batch")
    tensors, layers = problem(*shape, hidden)
    expected = values_and_gradients(tensors, layers, pairs=pairs, backend="reference")
    for budget in (1, 2**26):  # activations are recomputed, or kept
        found = values_and_gradients(tensors, layers, pairs=pairs, backend="cpu", memory_budget=budget)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("pairs", ["all", "off_diagonal"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_the_definition(shape: tuple, hidden: tuple[int, ...], pairs: str) -> None:
    if pairs == "off_diagonal" and shape[1] != shape[2]:
        pytest.skip("off-diagonal pairs need a square batch")
    tensors, layers = problem(*shape, hidden)
    expected = values_and_gradients(tensors, layers, pairs=pairs, backend="reference")
    for budget in (1, TINY):
        found = values_and_gradients(tensors, layers, pairs=pairs, backend="chunked", memory_budget=budget)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", HIDDEN[:2])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, output: str, hidden: tuple[int, ...], backend: str) -> None:
    tensors, layers = problem(None, 7, 7, False, hidden)
    options = {"activation": activation, "output": output}
    expected = values_and_gradients(tensors, layers, **options, backend="reference")
    found = values_and_gradients(tensors, layers, **options, backend=backend, memory_budget=TINY)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_scores_are_the_mlp_of_concatenated_pairs() -> None:
    tensors, layers = problem(None, 4, 6, False, (5, 3))
    x, y, *rest = tensors
    expected = torch.empty(4, 6, dtype=torch.float64)
    for i in range(4):
        for j in range(6):
            h = torch.cat([x[i], y[j]])
            for k in range(layers):
                h = rest[k] @ (h.relu() if k else h) + rest[layers + k]
            expected[i, j] = h.squeeze()
    torch.testing.assert_close(api.scores(x, y, rest[:layers], rest[layers:]), expected)


def test_positive_alone_is_the_diagonal() -> None:
    tensors, layers = problem(3, 5, 5, True, (4, 6))
    found = values_and_gradients(tensors, layers, stats=("positive",))
    x, y, *rest = tensors
    torch.testing.assert_close(
        found[0], api.scores(x, y, rest[:layers], rest[layers:]).diagonal(dim1=-2, dim2=-1)
    )


def test_unrequested_statistics_are_none() -> None:
    tensors, layers = problem(None, 5, 5, False, (4,))
    x, y, *rest = tensors
    found = api.statistics(x, y, rest[:layers], rest[layers:], stats=("row_sum", "col_lse"), memory_budget=1)
    assert found.positive is None and found.row_lse is None
    assert found.row_sum is not None and found.col_lse is not None


def test_non_contiguous_inputs_and_several_leading_dimensions() -> None:
    tensors, layers = problem(None, 5, 5, False, (4, 6))
    x = torch.randn(2, 3, 3, 5, dtype=torch.float64).mT
    y = torch.randn(2, 5, 3, 4, dtype=torch.float64)[..., ::2].transpose(1, 2)
    tensors = [x, y, *(t.mT.contiguous().mT if t.dim() == 2 else t for t in tensors[2:])]
    expected = values_and_gradients(tensors, layers, backend="reference")
    found = values_and_gradients(tensors, layers, backend="chunked", memory_budget=TINY)
    assert found[0].shape == (2, 3, 5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_all_pairs_kept_in_the_budget_equals_recomputing() -> None:
    tensors, layers = problem(2, 9, 9, False, (8, 8))
    kept = values_and_gradients(tensors, layers, backend="chunked", memory_budget=2**26)
    recomputed = values_and_gradients(tensors, layers, backend="chunked", memory_budget=TINY)
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pairs", ["all", "off_diagonal"])
@pytest.mark.parametrize("shape", [(None, 4, 4, False), (2, 3, 3, True)])
def test_gradients_and_second_derivatives(shape: tuple, pairs: str) -> None:
    tensors, layers = problem(*shape, (3, 2))
    leaves = [t.requires_grad_() for t in tensors]

    def call(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(list(t), layers, activation="tanh", pairs=pairs, backend="chunked", memory_budget=1))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_get_no_gradient(backend: str) -> None:
    tensors, layers = problem(None, 6, 6, False, (4, 5))
    x = tensors[0].requires_grad_()
    expected = torch.autograd.grad(sum(t.sum() for t in run(tensors, layers, backend="reference")), x)
    found = torch.autograd.grad(
        sum(t.sum() for t in run(tensors, layers, backend=backend, memory_budget=1)), x
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("off_diagonal", [False, True])
def test_operators_pass_opcheck(off_diagonal: bool, backend: str) -> None:
    u, v = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    weights, biases = [torch.randn(1, 3, 4), torch.randn(2, 1, 3)], [torch.randn(1, 3), torch.randn(2, 1)]
    ops = torch.ops.mi_kernels
    critic = (u, v, weights, biases, "relu", "identity", off_diagonal)
    for keep in (False, backend == "cpu"):
        arguments = (*critic, ROW_LSE | COL_LSE, torch.tensor(1.0), keep, 100, backend)
        torch.library.opcheck(ops.mlp_critic_forward.default, arguments)
        positive, row_lse, col_lse, row_sum, _, _, *kept = ops.mlp_critic_forward(*arguments)
        for need in (True, False):
            given = (*critic, row_lse, col_lse, positive, row_lse, None, row_sum, row_sum, *kept, need, 100, backend)
            torch.library.opcheck(ops.mlp_critic_backward.default, given)
    if not off_diagonal:
        rectangular = (u, v[:, :3], weights, biases, "gelu", "softplus", False, 0, torch.tensor(1.0), False, 1, backend)
        torch.library.opcheck(ops.mlp_critic_forward.default, rectangular)


@pytest.mark.parametrize("budget", [TINY, 2**26])
def test_compiles_without_graph_breaks(budget: int) -> None:
    tensors, layers = problem(None, 6, 6, False, (4, 5))
    leaves = [t.requires_grad_() for t in tensors]

    def call(*t: Tensor) -> Tensor:
        return sum(s.square().mean() for s in run(list(t), layers, memory_budget=budget))  # type: ignore[return-value]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), call(*leaves))
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(found, torch.autograd.grad(call(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [(32, 16), (70,)])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_error_is_at_most_twice_that_of_plain_torch(
    dtype: torch.dtype, backend: str, hidden: tuple[int, ...], activation: str
) -> None:
    tensors, layers = problem(2, 24, 24, True, hidden)
    tensors = [t.to(dtype) for t in tensors]
    options = {"activation": activation, "clip": 0.5}
    exact = values_and_gradients([t.double() for t in tensors], layers, **options, backend="reference")
    plain = values_and_gradients(tensors, layers, **options, backend="reference")
    for budget in (2**14, 2**26):
        found = values_and_gradients(tensors, layers, **options, backend=backend, memory_budget=budget)
        for f, p, e in zip(found, plain, exact, strict=True):
            error, allowed = (f.double() - e).norm(), 2 * (p.double() - e).norm() + 1e-6 * e.norm()
            assert error <= allowed
        assert all(t.dtype == torch.float32 for t in found[:6])


@needs_extension
def test_scores_of_500_and_nan_inputs_come_out_as_they_are() -> None:
    tensors, layers = problem(None, 6, 6, False, (8, 8), torch.float32)
    tensors[-1] = tensors[-1] * 0 + 500.0
    found = values_and_gradients(tensors, layers, backend="cpu")
    assert all(t.isfinite().all() for t in found)
    tensors[0][2, 1] = torch.nan
    row_lse = run(tensors, layers, backend="cpu", stats=("row_lse",))[0]
    assert row_lse.isnan().tolist() == [False, False, True, False, False, False]


@needs_extension
def test_tiles_of_16_bits_follow_the_matmul_precision() -> None:
    tensors, layers = problem(None, 40, 40, False, (64, 64), torch.float32)
    exact = values_and_gradients([t.double() for t in tensors], layers, backend="reference")
    torch.set_float32_matmul_precision("medium")
    try:
        found = values_and_gradients(tensors, layers, backend="cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    short = values_and_gradients([t.bfloat16() for t in tensors], layers, backend="reference")
    for f, p, e in zip(found, short, exact, strict=True):
        assert (f.double() - e).norm() <= 2 * (p.double() - e).norm() + 1e-6 * e.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_do_not_underflow(backend: str) -> None:
    tensors, layers = problem(None, 16, 16, False, (8, 8))
    half = [t.half().requires_grad_() for t in tensors]
    found = run(half, layers, stats=("row_lse",), backend=backend, memory_budget=1)[0]
    (tiny,) = torch.autograd.grad((found * 1e-6).sum(), half[-1])
    exact = [t.detach().double().requires_grad_() for t in half]
    reference = run(exact, layers, stats=("row_lse",), backend="reference")[0]
    (expected,) = torch.autograd.grad((reference * 1e-6).sum(), exact[-1])
    torch.testing.assert_close(tiny.double(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_layers_in_its_dtype_and_keeps_statistics_in_fp32(backend: str) -> None:
    tensors, layers = problem(None, 8, 8, False, (16, 16), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(leaves, layers, backend=backend, memory_budget=TINY)
    expected = run([t.detach().bfloat16() for t in leaves], layers, backend="reference")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    for gradient in torch.autograd.grad(sum(t.sum() for t in found), leaves):  # type: ignore[arg-type]
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_batch_permutes_the_statistics(backend: str) -> None:
    tensors, layers = problem(None, 11, 11, False, (8, 8))
    order = torch.randperm(11)
    before = run(tensors, layers, backend=backend, memory_budget=TINY)
    after = run(
        [tensors[0][order], tensors[1][order], *tensors[2:]], layers, backend=backend, memory_budget=TINY
    )
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b[order])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    tensors, layers = problem(2, 17, 17, False, (8, 8), torch.float32)
    first = values_and_gradients(tensors, layers, backend=backend, memory_budget=TINY)
    second = values_and_gradients(tensors, layers, backend=backend, memory_budget=TINY)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def saved_bytes(b: int) -> int:
    tensors, layers = problem(None, b, b, False, (8, 8), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = run(leaves, layers, backend="chunked", memory_budget=1024)
    assert found
    return sum(kept.values())


def test_memory_kept_for_backward_is_linear_in_the_batch() -> None:
    small, middle, large = (saved_bytes(b) for b in (64, 128, 192))
    assert large - middle == middle - small
    assert large - middle <= 64 * 4 * 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 3)}, "x must have shape .* and not be empty"),
        ({"x": torch.zeros(3)}, "x must have shape"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x must be float64"),
        ({"x": torch.zeros(4, 7)}, r"weights\[0\] must take 9 features"),
        ({"y": torch.zeros(4, 2, dtype=torch.float64)}, "y must have the dtype of x"),
        ({"y": torch.zeros(4, 2, device="meta")}, "y must be on the device of x"),
        ({"y": torch.zeros(2, 4, 2)}, "y must have the leading dimensions"),
        ({"y": torch.zeros(5, 2)}, "y must have as many samples as x"),
        ({"weights": [torch.zeros(1, 5)], "biases": [torch.zeros(1)]}, "at least one hidden"),
        (
            {"weights": [torch.zeros(6, 5), torch.zeros(2, 6)], "biases": [torch.zeros(6), torch.zeros(2)]},
            "one score",
        ),
        ({"biases": [torch.zeros(5), torch.zeros(1)]}, r"biases\[0\] must be \(6,\)"),
        ({"weights": [torch.zeros(2, 6, 5), torch.zeros(2, 1, 6)]}, "has 2 groups"),
        ({"activation": "softmax"}, "activation must be one of"),
        ({"stats": ("positive", "lse")}, "stats must be"),
        ({"stats": "row_lse"}, "stats must be"),
        ({"pairs": "upper"}, "pairs must be one of"),
        ({"memory_budget": 0}, "memory_budget must be"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(4, 3),
        "y": torch.zeros(4, 2),
        "weights": [torch.zeros(6, 5), torch.zeros(1, 6)],
        "biases": [torch.zeros(6), torch.zeros(1)],
    }
    with pytest.raises(ValueError, match=message):
        api.statistics(**(arguments | change))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_named_kernel_refuses_deeper_critics(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(dispatch, "resolve", lambda op, device, name: name)
    tensors, layers = problem(None, 3, 3, False, (4, 4, 4))
    with pytest.raises(RuntimeError, match=f"'{backend}' was requested but only supports critics of one or two"):
        run(tensors, layers, backend=backend)


def test_triton_keeps_scores_and_bits_by_rows() -> None:
    assert kept_shapes(2, 5, 3, 33, "triton") == ((2, 5, 3), (2, 5, 2, 3))
