"""LSTM scans under torch.func, forward mode and batched or repeated backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

import mi_kernels as mk
from mi_kernels.backends import extension_status
from mi_kernels.ops.lstm_scan import reference
from mi_kernels.ops.lstm_scan.problem import Scan
from tests.ops.lstm_scan.test_lstm_scan import decode_by_cells
from tests.ops.transforms_cases import assert_batched_and_repeated_backward, assert_transforms

BACKENDS = ["reference", *(["cpu"] if extension_status() == "available" else [])]
F64 = torch.float64
LENGTHS = [None, torch.tensor([2, 1])]


def draw(lead: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """x, weight_ih, weight_hh, bias, h0 and c0: two rows, two steps, two features, two units."""
    shapes = ((2, 2, 2), (8, 2), (8, 2), (8,), (2, 2), (2, 2))
    return tuple(torch.randn(*lead, *shape, dtype=F64) / 2 for shape in shapes)


def plain(lengths: Tensor | None):
    def run(x, weight_ih, weight_hh, bias, h0, c0):
        grouped = weight_hh.dim() == 3
        group = lambda t: t if grouped or t is None else t.unsqueeze(0)  # noqa: E731
        gates = x @ (weight_ih.mT.unsqueeze(-3) if grouped else weight_ih.mT)
        found = reference.scan(Scan(*map(group, (gates, weight_hh, bias, h0, c0, lengths))), x.shape[-2])[:2]
        return found if grouped else tuple(t.squeeze(0) for t in found)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "ragged"])
def test_transforms_of_a_layer(lengths: Tensor | None, backend: str) -> None:
    def operator(x, weight_ih, weight_hh, bias, h0, c0):
        return mk.lstm(x, weight_ih, weight_hh, bias, None, h0, c0, lengths=lengths, backend=backend)

    assert_transforms(operator, plain(lengths), draw())


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_layers_in_groups(backend: str) -> None:
    def operator(x, weight_ih, weight_hh, bias, h0, c0):
        return mk.lstm(x, weight_ih, weight_hh, bias, None, h0, c0, backend=backend)

    assert_transforms(operator, plain(None), draw((2,)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "ragged"])
def test_transforms_of_a_scan(lengths: Tensor | None, backend: str) -> None:
    def operator(x, weight_ih, weight_hh, bias, h0, c0):
        return mk.lstm_scan(x @ weight_ih.mT, weight_hh, bias, h0, c0, lengths=lengths, backend=backend)

    assert_transforms(operator, plain(lengths), draw())


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_a_decoder(backend: str) -> None:
    code, weight_ih, weight_hh, bias = (t[0] if k == 0 else t for k, t in enumerate(draw()[:4]))
    operator = lambda c, a, b, bias: mk.lstm_decode(c, a, b, bias, None, 3, backend=backend)  # noqa: E731
    formula = lambda c, a, b, bias: decode_by_cells(c, a, b, bias, 0 * bias, 3)  # noqa: E731
    codes = torch.stack([code, code.cos()])
    torch.testing.assert_close(
        vmap(operator, (0, None, None, None))(codes, weight_ih, weight_hh, bias),
        torch.stack([formula(c, weight_ih, weight_hh, bias) for c in codes]),
    )
    leaves = [t.clone().requires_grad_() for t in (code, weight_ih, weight_hh, bias)]
    slope = torch.randn(2, 3, 2, dtype=F64)
    gradients = torch.autograd.grad(formula(*leaves), leaves, slope)
    tangents = tuple(t.detach().sin() for t in leaves)
    found = jvp(operator, (code, weight_ih, weight_hh, bias), tangents)[1]
    want = torch.stack([(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]).sum()
    torch.testing.assert_close((found * slope).sum(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projected", [False, True])
def test_gradients_of_dependent_inputs_do_not_depend_on_how_they_are_asked_for(projected: bool, backend: str) -> None:
    _, weight_ih, weight_hh, bias, _, _ = draw()

    def call(x: Tensor) -> Tensor:
        h0, weight = x[:, 0].sin(), weight_hh * x.mean()
        states = (h0, h0 * 2)
        if projected:
            return torch.stack(mk.lstm(x, weight_ih, weight, bias, None, *states, lengths=LENGTHS[1], backend=backend))
        return torch.stack(mk.lstm_scan(x @ weight_ih.mT, weight, bias, *states, backend=backend))

    assert_batched_and_repeated_backward(call, torch.randn(2, 2, 2, dtype=F64))
