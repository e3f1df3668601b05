"""Decoders that feed back their own outputs: values and gradients of the step loop, in groups or alone; errors that
ignore padding."""

import pytest
import torch
from torch import nn

from models.batch import Inputs
from models.layers import LSTMDecoder
from models.layers.decoders import decoded_states, sequence_errors, token_cross_entropy


def by_cells(decoder, code, steps):
    cell = nn.LSTMCell(decoder.hidden, decoder.hidden).to(code)
    cell.weight_ih, cell.weight_hh = decoder.weight_ih, decoder.weight_hh
    cell.bias_ih, cell.bias_hh = decoder.bias_ih, decoder.bias_hh
    h, c, states = torch.zeros_like(code), torch.zeros_like(code), []
    for t in range(steps):
        h, c = cell(h if t else code, (h, c))
        states.append(h)
    return torch.stack(states, 1)


def test_decoders_together_are_the_step_loops_apart():
    decoders = [LSTMDecoder(width, 3).double() for width in (6, 5, 6, 6)]
    steps = [4, 4, 4, 7]
    codes = [torch.randn(3, d.hidden, dtype=torch.float64, requires_grad=True) for d in decoders]
    leaves = [*codes, *(p for d in decoders for p in list(d.parameters())[:4])]
    found = decoded_states(decoders, codes, steps)
    wanted = [by_cells(*case) for case in zip(decoders, codes, steps, strict=True)]
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(sum(h.square().sum() for h in hs), leaves) for hs in (found, wanted)]
    for f, w in zip(*gradients, strict=True):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-12)
    assert not torch.allclose(*gradients[0][4:6])  # weight_ih also gets a gradient from step 0


def test_padding_reaches_no_error_unless_asked_for():
    found = torch.randn(3, 5, 2, requires_grad=True)
    lengths = torch.tensor([5, 2, 0])
    within = torch.arange(5) < lengths[:, None]
    values = torch.randn(3, 5, 2).masked_fill(~within[..., None], torch.nan)
    loss = sequence_errors(found, Inputs(values, lengths))
    torch.testing.assert_close(loss, (found - values)[within].square().mean())
    (gradient,) = torch.autograd.grad(loss, found)
    assert (gradient[~within] == 0).all() and gradient.isfinite().all()
    public = (found - values.nan_to_num()).square().mean()
    torch.testing.assert_close(sequence_errors(found, Inputs(values, lengths), padding=True), public)


def test_words_in_chunks_are_the_cross_entropy_of_all_logits():
    out, states = nn.Linear(4, 11), torch.randn(3, 5, 4, requires_grad=True)
    tokens = Inputs(torch.randint(11, (3, 5)), torch.tensor([5, 1, 3]))
    within = torch.arange(5) < tokens.lengths[:, None]
    wanted = nn.functional.cross_entropy(out(states)[within], tokens.values[within])
    found = token_cross_entropy(states, out, tokens, block=7 * 2)
    torch.testing.assert_close(found, wanted)
    leaves = [states, *out.parameters()]
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True)
    for f, w in pairs:
        torch.testing.assert_close(f, w)


def test_arguments_that_do_not_fit_are_named():
    decoder = LSTMDecoder(4, 2)
    with pytest.raises(ValueError, match=r"codes\[0\] must have shape \[batch, 4\]"):
        decoded_states([decoder], [torch.zeros(2, 3)], [5])
    with pytest.raises(ValueError, match=r"steps\[0\] must be at least 1, got 0"):
        decoded_states([decoder], [torch.zeros(2, 4)], [0])
    with pytest.raises(ValueError, match="codes and steps must be one per decoder, 1"):
        decoded_states([decoder], [], [5])
    with pytest.raises(ValueError, match="states must have shape"):
        token_cross_entropy(torch.zeros(2, 3, 4), nn.Linear(4, 5), Inputs(torch.zeros(2, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="found must have the shape of wanted"):
        sequence_errors(torch.zeros(2, 3, 4), Inputs(torch.zeros(2, 3, 5)))
