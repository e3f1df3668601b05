"""The LSTM scan against torch.nn.LSTM and LSTMCell in fp64: states, gradients, lengths, dtypes, memory, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mi_kernels as mk
from mi_kernels import backends
from mi_kernels.ops.lstm_scan import dispatch

SHAPES = [(1, 1, 1), (1, 5, 3), (3, 1, 4), (2, 4, 1), (5, 7, 17), (33, 3, 16), (19, 6, 70), (70, 2, 33)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    reason = backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def draw(batch: int, steps: int, hidden: int, dtype=torch.float64, lead=()) -> list[Tensor]:
    """gates, weight_hh, bias, h0 and c0, as leaf tensors."""
    shapes = ((batch, steps, 4 * hidden), (4 * hidden, hidden), (4 * hidden,), (batch, hidden), (batch, hidden))
    scales = (1.0, hidden**-0.5, 0.3, 0.5, 0.5)
    drawn = [torch.randn(*lead, *shape, dtype=torch.float64) * s for shape, s in zip(shapes, scales, strict=True)]
    return [t.to(dtype).requires_grad_() for t in drawn]


def by_cells(gates, weight, bias=None, h0=None, c0=None, lengths=None):
    """torch.lstm_cell in fp64, row by row, with an identity as the input's weight."""
    gates, weight = gates.double(), weight.double()
    batch, steps, width = gates.shape
    eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    bias = zero if bias is None else bias.double()
    start = torch.zeros(batch, width // 4, dtype=torch.float64)
    h0, c0 = (start if s is None else s.double() for s in (h0, c0))
    rows = []
    for b in range(batch):
        h, c, states = h0[b : b + 1], c0[b : b + 1], []
        for t in range(steps):
            if lengths is not None and t >= lengths[b]:
                states += [torch.zeros(2, 1, width // 4, dtype=torch.float64)] * (steps - t)
                break
            h, c = torch.lstm_cell(gates[b : b + 1, t], (h, c), eye, weight, zero, bias)
            states.append(torch.stack([h, c]))
        rows.append(torch.stack(states, 2))
    h, c = torch.cat(rows, 1) + 0 * sum(t.nan_to_num().sum() for t in (gates, weight, bias, h0, c0))
    return h, c


def gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    return torch.autograd.grad(loss, leaves)


def assert_close(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_lstm_cells(backend, shape):
    leaves = draw(*shape)
    found, expected = mk.lstm_scan(*leaves, backend=backend), by_cells(*leaves)
    assert_close(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_end_at_their_lengths_whatever_lies_beyond(backend, shape):
    leaves = draw(*shape)
    lengths = torch.randint(0, shape[1] + 1, shape[:1])
    with torch.no_grad():
        for b, length in enumerate(lengths):
            leaves[0][b, length:] = torch.nan
    found, expected = mk.lstm_scan(*leaves, lengths=lengths, backend=backend), by_cells(*leaves, lengths)
    assert_close(found, expected)
    for b, length in enumerate(lengths):
        assert not found[0][b, length:].any() and not found[1][b, length:].any()
    # the oracle would multiply NaN padding by a zero gradient, so replace it
    clean = [t.detach().nan_to_num().requires_grad_() for t in leaves]
    assert_close(gradients(found, leaves), gradients(by_cells(*clean, lengths), clean))


def test_a_gradient_that_arrives_beyond_a_length_is_ignored(backend):
    leaves = draw(4, 5, 6)
    lengths = torch.tensor([5, 0, 3, 1])
    h, c = mk.lstm_scan(*leaves, lengths=lengths, backend=backend)
    slope = torch.randn(4, 5, 6, dtype=torch.float64)
    beyond = torch.arange(5)[None] >= lengths[:, None]
    poisoned = slope.masked_fill(beyond.unsqueeze(-1), torch.nan)
    clean = slope.masked_fill(beyond.unsqueeze(-1), 0)
    found = torch.autograd.grad([h, c], leaves, [poisoned, poisoned], retain_graph=True)
    assert_close(found, torch.autograd.grad([h, c], leaves, [clean, clean]))


@pytest.mark.parametrize("packed", [False, True])
def test_equals_nn_lstm(backend, packed):
    batch, steps, features, hidden = 6, 9, 5, 8
    lstm = nn.LSTM(features, hidden, batch_first=True, dtype=torch.float64)
    x = torch.randn(batch, steps, features, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([9, 4, 1, 7, 9, 2]) if packed else None
    gates = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
    h, _ = mk.lstm_scan(gates, lstm.weight_hh_l0, lstm.bias_hh_l0, lengths=lengths, backend=backend)
    if packed:
        sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        expected, _ = nn.utils.rnn.pad_packed_sequence(lstm(sequence)[0], batch_first=True)
    else:
        expected, _ = lstm(x)
    torch.testing.assert_close(h, expected)
    leaves = [x, *lstm.parameters()]
    assert_close(gradients([h], leaves), gradients([expected], leaves))


def test_parts_that_are_left_out_are_zeros(backend):
    gates, weight, *_ = draw(5, 4, 7)
    assert_close(mk.lstm_scan(gates, weight, backend=backend), by_cells(gates, weight))
    c0 = torch.randn(5, 7, dtype=torch.float64)
    found = mk.lstm_scan(gates, weight, c0=c0, backend=backend)
    assert_close(found, by_cells(gates, weight, c0=c0))


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_output_alone(backend, which):
    leaves = draw(5, 4, 7)
    found, expected = mk.lstm_scan(*leaves, backend=backend)[which], by_cells(*leaves)[which]
    assert_close(gradients([found], leaves), gradients([expected], leaves))


def test_only_the_gradients_that_are_wanted(backend):
    leaves = draw(5, 4, 7)
    for k in range(len(leaves)):
        problem = [t.detach().requires_grad_(j == k) for j, t in enumerate(leaves)]
        (found,) = gradients(mk.lstm_scan(*problem, backend=backend), [problem[k]])
        torch.testing.assert_close(found, gradients(by_cells(*leaves), [leaves[k]])[0])


def test_groups_are_scans_of_their_own(backend):
    leaves = draw(5, 4, 9, lead=(3,))
    lengths = torch.randint(0, 5, (3, 5))
    found = mk.lstm_scan(*leaves, lengths=lengths, backend=backend)
    each = [by_cells(*(t[g] for t in leaves), lengths[g]) for g in range(3)]
    expected = [torch.stack(part) for part in zip(*each, strict=True)]
    assert_close(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_gradcheck_twice(backend):
    leaves = draw(3, 3, 2)
    lengths = torch.tensor([3, 1, 2])
    run = lambda *a: mk.lstm_scan(*a, lengths=lengths, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    gates, weight, *_ = leaves
    assert torch.autograd.gradgradcheck(lambda a, b: mk.lstm_scan(a, b, backend=backend)[1], (gates, weight))


def test_one_tensor_may_serve_as_both_initial_states(backend):
    gates, weight, bias, h0, _ = draw(3, 3, 2)
    run = lambda g, s: mk.lstm_scan(g, weight, bias, s, s, backend=backend)[0]  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (gates, h0))


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_fp32_is_as_accurate_as_cells(backend, size):
    leaves = draw(17, 12, 40, torch.float32)
    with torch.no_grad():
        leaves[0] *= size
    expected = by_cells(*leaves)
    wanted = gradients(expected, leaves)
    found = mk.lstm_scan(*leaves, backend=backend)
    for a, b in zip([*found, *gradients(found, leaves)], [*expected, *wanted], strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_inputs_are_scanned_in_fp32(backend, dtype):
    leaves = draw(17, 12, 40, dtype)
    expected = by_cells(*leaves)
    found = mk.lstm_scan(*leaves, backend=backend)
    rounding = 2 ** -(9 if dtype == torch.bfloat16 else 12)
    for a, b in zip([*found, *gradients(found, leaves)], [*expected, *gradients(expected, leaves)], strict=True):
        assert a.dtype == dtype
        # the incoming gradients are rounded to the 16-bit dtype before they reach the scan
        assert error(a, b) < 2 * rounding


@pytest.mark.parametrize("value", [-1e4, -90.0, 90.0, 1e4, torch.inf, -torch.inf])
def test_saturated_gates_stay_finite(backend, value):
    gates, weight, *_ = draw(3, 4, 5, torch.float32)
    found = mk.lstm_scan(torch.full_like(gates, value).requires_grad_(), weight, backend=backend)
    finite = torch.full_like(gates, max(min(value, 1e6), -1e6))
    assert_close(found, [t.float() for t in by_cells(finite, weight)], 1e-6)
    assert all(t.isfinite().all() for t in gradients(found, [weight]))


def test_a_nan_shows_in_its_row_alone(backend):
    gates, weight, *_ = draw(20, 4, 5, torch.float32)
    with torch.no_grad():
        gates[13, 2, 7] = torch.nan
    h, c = mk.lstm_scan(gates, weight, backend=backend)
    assert c[13, 2:].isnan().any() and h[13, 3].isnan().all()
    rest = torch.arange(20) != 13
    assert h[rest].isfinite().all() and h[13, :2].isfinite().all()


def test_autocast_scans_16_bit_inputs(backend):
    gates, weight, bias, h0, c0 = draw(6, 5, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = mk.lstm_scan(gates.bfloat16(), weight, bias, h0, c0, backend=backend)
        code = mk.lstm_decode(h0, weight, weight, bias, None, 3, backend=backend)
    short = [t.bfloat16() for t in (gates, weight, bias, h0, c0)]
    assert_close((h, c), mk.lstm_scan(*short, backend=backend), 0)
    assert code.dtype == torch.bfloat16
    (g,) = torch.autograd.grad(h.float().sum(), weight)
    assert g.dtype == torch.float32


def test_opcheck_accepts_the_operators(backend):
    gates, weight, bias, h0, c0 = (t.detach() for t in draw(3, 4, 5, torch.float32, lead=(2,)))
    lengths = torch.tensor([[4, 2, 0], [1, 4, 3]])
    ops = torch.ops.mi_kernels
    tests = ("test_schema", "test_faketensor")
    for rest, steps in (((bias, h0, c0, lengths), 4), ((None, None, None, None), 6)):
        problem = (gates, weight, *rest)
        for keep in (True, False):
            torch.library.opcheck(
                ops.lstm_scan_forward.default, (*problem, steps, keep, backend), test_utils=tests
            )
        h, c, activations = ops.lstm_scan_forward(*problem, steps, True, backend)
        saved = (weight, *rest[1:], h, c, activations)
        for g_h, g_c, needs in ((h, c, 15), (None, c, 0)):
            torch.library.opcheck(
                ops.lstm_scan_backward.default, (*saved, g_h, g_c, 4, needs, backend), test_utils=tests
            )


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(backend, packed):
    leaves = draw(5, 4, 6, torch.float32)
    lengths = torch.tensor([4, 0, 3, 1, 2]) if packed else None

    def run(*leaves):
        return mk.lstm_scan(*leaves, lengths=lengths, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), run(*leaves)
    assert_close(found, expected, 1e-6)
    assert_close(gradients(found, leaves), gradients(expected, leaves), 1e-5)


def assert_same_bits(operator, leaves, steps, backend):
    """Two runs give the same bits, on a CPU also with different numbers of threads."""
    lengths = torch.randint(0, steps + 1, (75,))

    def run():
        found = operator(*leaves, lengths=lengths, backend=backend)
        return *found, *gradients(found, leaves)

    first, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = run()
    finally:
        torch.set_num_threads(threads)
    if backend == "cpu":
        assert_close(first, second, 0)
    assert_close(run(), run(), 0)


@pytest.mark.usefixtures("two_threads")
def test_the_bits_are_the_same_twice_and_on_any_number_of_threads(backend):
    assert_same_bits(mk.lstm_scan, draw(75, 9, 20, torch.float32), 9, backend)


def test_permuting_the_batch_changes_nothing(backend):
    gates, weight, bias, h0, c0 = draw(40, 5, 12)
    lengths = torch.randint(0, 6, (40,))
    order = torch.randperm(40)
    found = mk.lstm_scan(gates[order], weight, bias, h0[order], c0[order], lengths=lengths[order], backend=backend)
    expected = mk.lstm_scan(gates, weight, bias, h0, c0, lengths=lengths, backend=backend)
    assert_close(found, [t[order] for t in expected], 1e-13)


def test_inputs_may_be_strided_or_expanded(backend):
    gates, weight, bias, h0, c0 = (t.detach() for t in draw(6, 5, 8))
    expected = mk.lstm_scan(gates, weight, bias, h0[:1].expand(6, 8).contiguous(), c0, backend=backend)
    strided = gates.transpose(0, 1).contiguous().transpose(0, 1)
    lengths = torch.full((12,), 5, dtype=torch.int32)[::2]
    found = mk.lstm_scan(
        strided, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 1], h0[:1].expand(6, 8), c0,
        lengths=lengths, backend=backend,
    )
    assert_close(found, expected, 1e-13)


def test_the_gates_are_not_kept_for_backward(backend):
    leaves = draw(30, 11, 16, torch.float32)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        mk.lstm_scan(*leaves, backend=backend)
    parameters = sum(t.numel() for t in leaves[1:])
    assert total <= 4 * (6 * 30 * 11 * 16 + parameters) + 64


def test_nothing_is_kept_without_a_gradient(backend):
    gates, weight, *_ = (t.detach() for t in draw(3, 4, 5))
    assert not any(t.requires_grad for t in mk.lstm_scan(gates, weight, backend=backend))
    with torch.no_grad():
        found = mk.lstm_scan(*draw(3, 4, 5), backend=backend)
    assert not any(t.requires_grad for t in found)


# --- with the projection of the input ---------------------------------------------------------------------------------


def draw_layer(batch, steps, features, hidden, dtype=torch.float64, lead=()) -> list[Tensor]:
    """x, weight_ih, weight_hh, both biases, h0 and c0, as leaf tensors."""
    shapes = [(batch, steps, features), (4 * hidden, features), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
    shapes += [(batch, hidden), (batch, hidden)]
    scales = (1.0, features**-0.5, hidden**-0.5, 0.3, 0.3, 0.5, 0.5)
    drawn = [torch.randn(*lead, *shape, dtype=torch.float64) * s for shape, s in zip(shapes, scales, strict=True)]
    return [t.to(dtype).requires_grad_() for t in drawn]


def layer_by_cells(x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, lengths=None):
    """by_cells after a projection of the input in fp64; steps beyond the lengths are not read."""
    if lengths is not None:
        x = x.where((torch.arange(x.shape[1]) < lengths[:, None]).unsqueeze(-1), 0)
    return by_cells(x.double() @ weight_ih.double().T + bias_ih.double(), weight_hh, bias_hh, h0, c0, lengths)


LAYERS = [(1, 1, 1, 1), (3, 5, 2, 3), (2, 4, 1, 17), (33, 3, 70, 16), (19, 40, 5, 20), (70, 9, 33, 6), (65, 6, 130, 40)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", LAYERS)
def test_a_layer_equals_lstm_cells_whatever_lies_beyond_the_lengths(backend, shape, ragged):
    leaves = draw_layer(*shape)
    lengths = torch.randint(0, shape[1] + 1, shape[:1]) if ragged else None
    expected = layer_by_cells(*leaves, lengths)
    wanted = gradients(expected, leaves)
    with torch.no_grad():
        for b, length in enumerate(lengths if ragged else ()):
            leaves[0][b, length:] = torch.nan
    found = mk.lstm(*leaves, lengths=lengths, backend=backend)
    assert_close(found, expected)
    assert_close(gradients(found, leaves), wanted)


def test_a_layer_has_the_parameters_and_values_of_nn_lstm(backend):
    module = nn.LSTM(5, 8, batch_first=True, dtype=torch.float64)
    x = torch.randn(6, 9, 5, dtype=torch.float64, requires_grad=True)
    found, expected = mk.lstm(x, *module.all_weights[0], backend=backend)[0], module(x)[0]
    torch.testing.assert_close(found, expected)
    leaves = [x, *module.parameters()]
    assert_close(gradients([found], leaves), gradients([expected], leaves))


def test_only_the_gradients_of_a_layer_that_are_wanted(backend):
    leaves = draw_layer(5, 4, 6, 7)
    expected = gradients(layer_by_cells(*leaves), leaves)
    for k in range(len(leaves)):
        problem = [t.detach().requires_grad_(j == k) for j, t in enumerate(leaves)]
        (found,) = gradients(mk.lstm(*problem, backend=backend), [problem[k]])
        torch.testing.assert_close(found, expected[k])


def test_layers_in_groups_and_without_what_is_optional(backend):
    leaves = draw_layer(5, 4, 3, 9, lead=(2,))
    lengths = torch.randint(0, 5, (2, 5))
    found = mk.lstm(*leaves, lengths=lengths, backend=backend)
    each = [layer_by_cells(*(t[g] for t in leaves), lengths[g]) for g in range(2)]
    expected = [torch.stack(part) for part in zip(*each, strict=True)]
    assert_close(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))
    bare = [t[0] for t in leaves]
    zeroed = [*bare[:3], *(0 * t for t in bare[3:])]
    assert_close(mk.lstm(*bare[:3], backend=backend), layer_by_cells(*zeroed))


def test_a_layer_gradcheck_twice(backend):
    leaves = draw_layer(3, 3, 2, 2)
    lengths = torch.tensor([3, 0, 2])
    run = lambda *a: mk.lstm(*a, lengths=lengths, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    grouped = draw_layer(2, 2, 2, 1, lead=(2,))
    assert torch.autograd.gradgradcheck(lambda *a: mk.lstm(*a, backend=backend)[1], grouped)


def test_a_layer_in_fp32_is_as_accurate_as_cells(backend):
    leaves = draw_layer(17, 30, 50, 40, torch.float32)
    expected = layer_by_cells(*leaves)
    found = mk.lstm(*leaves, backend=backend)
    for a, b in zip([*found, *gradients(found, leaves)], [*expected, *gradients(expected, leaves)], strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 2e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_on_short_inputs_rounds_the_gates_alone(backend, autocast):
    leaves = draw_layer(17, 12, 30, 40, torch.bfloat16)
    expected = layer_by_cells(*leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = mk.lstm(*(t.float() if autocast else t for t in leaves), backend=backend)
    for a, b in zip([*found, *gradients(found, leaves)], [*expected, *gradients(expected, leaves)], strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, b) < 4 * 2**-9


def test_a_layer_at_medium_precision_and_at_the_highest_agree():
    leaves = draw_layer(9, 8, 30, 24, torch.float32)
    found = mk.lstm(*leaves)
    wanted = gradients(found, leaves)
    try:
        torch.set_float32_matmul_precision("medium")
        again = mk.lstm(*leaves)
        slopes = gradients(again, leaves)
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip([*again, *slopes], [*found, *wanted], strict=True):
        assert error(a, b) < 2**-7


def test_opcheck_accepts_the_operators_of_a_layer(backend):
    x, weight_ih, weight_hh, bias, _, h0, c0 = (t.detach() for t in draw_layer(3, 4, 2, 5, torch.float32, lead=(2,)))
    lengths = torch.tensor([[4, 2, 0], [1, 4, 3]])
    ops, tests = torch.ops.mi_kernels, ("test_schema", "test_faketensor")
    for rest in ((bias, h0, c0, lengths), (None, None, None, None)):
        problem = (x, weight_ih, weight_hh, *rest)
        for keep in (True, False):
            torch.library.opcheck(ops.lstm_forward.default, (*problem, keep, backend), test_utils=tests)
        h, c, activations = ops.lstm_forward(*problem, True, backend)
        saved = (x, weight_ih, weight_hh, *rest[1:], h, c, activations)
        for g_h, g_c, needs in ((h, c, 63), (None, c, 0), (h, None, 16), (h, None, 32)):
            torch.library.opcheck(
                ops.lstm_backward.default, (*saved, g_h, g_c, needs, backend), test_utils=tests
            )


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_compiles_in_one_graph(backend, packed):
    leaves = draw_layer(5, 4, 3, 6, torch.float32)
    lengths = torch.tensor([4, 0, 3, 1, 2]) if packed else None
    run = lambda *a: mk.lstm(*a, lengths=lengths, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), run(*leaves)
    assert_close(found, expected, 1e-6)
    assert_close(gradients(found, leaves), gradients(expected, leaves), 1e-5)


@pytest.mark.usefixtures("two_threads")
def test_a_layer_has_the_same_bits_twice_and_on_any_number_of_threads(backend):
    assert_same_bits(mk.lstm, draw_layer(75, 29, 37, 20, torch.float32), 29, backend)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_sequences_of_more_than_16_mib_of_slopes(projected, ragged):
    if backends()["cpu"] != "available":
        pytest.skip(backends()["cpu"])
    operator = mk.lstm if projected else mk.lstm_scan
    leaves = draw_layer(80, 70, 24, 200, torch.float32) if projected else draw(80, 70, 200, torch.float32)
    lengths = torch.randint(0, 71, (80,)) if ragged else None
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = operator(*wide, lengths=lengths, backend="reference")
    found = operator(*leaves, lengths=lengths, backend="cpu")
    for a, b in zip([*found, *gradients(found, leaves)], [*expected, *gradients(expected, wide)], strict=True):
        assert error(a, b) < 2e-6


def test_rows_of_a_layer_that_all_end_at_once_leave_no_gradient(backend):
    leaves = draw_layer(3, 4, 2, 5)
    h, c = mk.lstm(*leaves, lengths=torch.zeros(3, dtype=torch.int64), backend=backend)
    assert not h.any() and not c.any()
    assert not any(g.any() for g in gradients([h, c], leaves))


# --- the autonomous mode --------------------------------------------------------------------------------------------


def draw_decoder(batch: int, hidden: int, dtype=torch.float64, lead=()) -> list[Tensor]:
    shapes = ((batch, hidden), (4 * hidden, hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    scales = (1.0, hidden**-0.5, hidden**-0.5, 0.3, 0.3)
    drawn = [torch.randn(*lead, *shape, dtype=torch.float64) * s for shape, s in zip(shapes, scales, strict=True)]
    return [t.to(dtype).requires_grad_() for t in drawn]


def decode_by_cells(code, weight_ih, weight_hh, bias_ih, bias_hh, steps):
    h, c = torch.zeros_like(code), torch.zeros_like(code)
    states = []
    for t in range(steps):
        h, c = torch.lstm_cell(code if t == 0 else h, (h, c), weight_ih, weight_hh, bias_ih, bias_hh)
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize(("batch", "hidden", "steps"), [(1, 1, 1), (3, 5, 1), (4, 9, 6), (35, 24, 3), (1, 16, 20)])
def test_decoding_equals_lstm_cells_that_are_fed_their_output(backend, batch, hidden, steps):
    leaves = draw_decoder(batch, hidden)
    found, expected = mk.lstm_decode(*leaves, steps, backend=backend), decode_by_cells(*leaves, steps)
    assert_close([found], [expected])
    slopes = gradients([found], leaves)
    assert_close(slopes, gradients([expected], leaves))
    assert batch * steps == 1 or not torch.equal(slopes[1], slopes[2])


def test_decoders_in_groups_and_without_biases(backend):
    code, weight_ih, weight_hh, *biases = draw_decoder(4, 6, lead=(2,))
    found = mk.lstm_decode(code, weight_ih, weight_hh, *biases, 5, backend=backend)
    for g in range(2):
        one = [t[g] for t in (code, weight_ih, weight_hh, *biases)]
        torch.testing.assert_close(found[g], decode_by_cells(*one, 5))
        none = mk.lstm_decode(*one[:3], None, None, 5, backend=backend)
        torch.testing.assert_close(none, decode_by_cells(*one[:3], *(0 * b for b in one[3:]), 5))
        single = mk.lstm_decode(*one[:4], None, 5, backend=backend)
        torch.testing.assert_close(single, decode_by_cells(*one[:4], 0 * one[4], 5))


def test_decoding_gradcheck_twice(backend):
    leaves = draw_decoder(2, 2)
    run = lambda *a: mk.lstm_decode(*a, 3, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_decoding_compiles_in_one_graph(backend):
    leaves = draw_decoder(5, 6, torch.float32)
    run = lambda *a: mk.lstm_decode(*a, 4, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close([compiled(*leaves)], [run(*leaves)], 1e-6)
    assert_close(gradients([compiled(*leaves)], leaves), gradients([run(*leaves)], leaves), 1e-5)


# --- rejected arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_hh": torch.zeros(8, 3)}, "weight_hh must have shape"),
        ({"weight_hh": torch.zeros(12)}, "weight_hh must have shape"),
        ({"gates": torch.zeros(2, 12)}, "gates must have shape"),
        ({"gates": torch.zeros(2, 4, 11)}, "gates must have shape"),
        ({"gates": torch.zeros(2, 0, 12)}, "not be empty"),
        ({"weight_hh": torch.zeros(2, 12, 3)}, "gates must have shape"),
        ({"bias": torch.zeros(11)}, "bias must have shape"),
        ({"h0": torch.zeros(3, 3)}, "h0 must have shape"),
        ({"c0": torch.zeros(2, 4)}, "c0 must have shape"),
        ({"c0": torch.zeros(2, 3).double()}, "c0 must have the dtype"),
        ({"gates": torch.zeros(2, 4, 12, dtype=torch.int64)}, "gates must be float64"),
        ({"lengths": torch.tensor([1])}, "lengths must have shape"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths must be of an integer type"),
        ({"lengths": torch.tensor([1, 5])}, "lengths must lie between 0 and T = 4, got 1 to 5"),
        ({"lengths": torch.tensor([-1, 3])}, "lengths must lie between"),
        ({"backend": "nothing"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"gates": torch.zeros(2, 4, 12), "weight_hh": torch.zeros(12, 3)} | change
    with pytest.raises(ValueError, match=message):
        mk.lstm_scan(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x must have shape"),
        ({"x": torch.zeros(2, 0, 5)}, "not be empty"),
        ({"weight_ih": torch.zeros(12, 4)}, "weight_ih must have shape"),
        ({"weight_hh": torch.zeros(12, 4)}, "weight_hh must have shape"),
        ({"bias_ih": torch.zeros(3)}, "bias_ih must have shape"),
        ({"bias_hh": torch.zeros(12).double()}, "bias_hh must have the dtype of x"),
        ({"h0": torch.zeros(3, 3)}, "h0 must have shape"),
        ({"lengths": torch.tensor([1, 5])}, "lengths must lie between 0 and T = 4, got 1 to 5"),
    ],
)
def test_bad_arguments_of_a_layer_are_named(change, message):
    arguments = {"x": torch.zeros(2, 4, 5), "weight_ih": torch.zeros(12, 5), "weight_hh": torch.zeros(12, 3)} | change
    with pytest.raises(ValueError, match=message):
        mk.lstm(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": torch.zeros(2, 4)}, "code must have shape"),
        ({"weight_ih": torch.zeros(12, 4)}, "weight_ih must have shape"),
        ({"bias_hh": torch.zeros(3)}, "bias_hh must have shape"),
        ({"bias_ih": torch.zeros(12).double()}, "bias_ih must have the dtype"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_arguments_of_a_decoder_are_named(change, message):
    arguments = {
        "code": torch.zeros(2, 3),
        "weight_ih": torch.zeros(12, 3),
        "weight_hh": torch.zeros(12, 3),
        "bias_ih": None,
        "bias_hh": None,
        "steps": 3,
    } | change
    with pytest.raises(ValueError, match=message):
        mk.lstm_decode(**arguments)


def test_tensors_and_integers_are_asked_for():
    with pytest.raises(TypeError, match="steps must be an integer, got float"):
        mk.lstm_decode(torch.zeros(1, 1), torch.zeros(4, 1), torch.zeros(4, 1), None, None, 2.0)
    with pytest.raises(TypeError, match="gates must be a tensor"):
        mk.lstm_scan([[1.0]], torch.zeros(4, 1))
    with pytest.raises(TypeError, match="x must be a tensor"):
        mk.lstm([[1.0]], torch.zeros(4, 1), torch.zeros(4, 1))
    with pytest.raises(TypeError, match="weight_ih must be a tensor"):
        mk.lstm(torch.zeros(1, 1, 1), None, torch.zeros(4, 1))


def test_triton_named_does_not_fall_back():
    with pytest.raises(RuntimeError, match="triton"):
        mk.lstm_scan(torch.zeros(1, 1, 4), torch.zeros(4, 1), backend="triton")


def test_a_gpu_takes_the_cuda_kernels_where_they_can_run(monkeypatch):
    gpu, status = torch.device("cuda"), {"cuda": "available"}
    monkeypatch.setattr(dispatch, "resolve", lambda op, device, requested: requested or "chunked")
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    assert dispatch._backend(gpu, torch.float32, "") == "cuda"
    assert dispatch._backend(gpu, torch.float64, "") == "reference"
    assert dispatch._backend(gpu, torch.float32, "reference") == "reference"
    with pytest.raises(RuntimeError, match="float64"):
        dispatch._backend(gpu, torch.float64, "cuda")
    status["cuda"] = "no"
    assert dispatch._backend(gpu, torch.bfloat16, "") == "reference"
