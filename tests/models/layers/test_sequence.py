"""Sequence encoders and the decoder against formulas for one sequence at a time, step by step."""

import pytest
import torch

from models.data import Inputs
from models.layers import LSTM, Dropouts, GRUEncoder, LSTMDecoder, LSTMEncoder, TransformerEncoder
from tests.models.layers.checks import (
    assert_gradients_reach_everything,
    assert_items_are_independent,
    assert_padding_is_never_read,
    draw,
    linear,
    lstm,
    needs_utd_mhad,
    rows,
    sigmoid,
    utd_batch,
)

ENCODERS = {
    "lstm": lambda dim: LSTMEncoder(dim, 7, 4, layers=2),
    "gru last": lambda dim: GRUEncoder(dim, 7, 4),
    "gru mean": lambda dim: GRUEncoder(dim, 7, 4, layers=2, bidirectional=True, readout="mean"),
    "gru both ends": lambda dim: GRUEncoder(dim, 7, 4, layers=2, bidirectional=True),
    "transformer mean": lambda dim: TransformerEncoder(dim, 8, 4, heads=2),
    "transformer last": lambda dim: TransformerEncoder(dim, 8, 4, heads=2, readout="last", causal=True),
}
every_encoder = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS.keys())


def batch():
    return draw([5, 2, 1, 7], 3)


@every_encoder
def test_padding_is_never_read(make):
    assert_padding_is_never_read(make(3).double(), batch())


@every_encoder
def test_an_item_does_not_depend_on_its_batch(make):
    assert_items_are_independent(make(3).double(), batch())


@every_encoder
def test_gradients_reach_every_parameter(make):
    encoder = make(3).double()
    assert encoder(batch()).shape == (4, 4) == (4, encoder.out_dim)
    assert_gradients_reach_everything(encoder, encoder(batch()))


@every_encoder
@needs_utd_mhad
def test_real_sequences(make):
    for x in utd_batch():
        encoder = make(x.values.shape[2])
        assert encoder(x).isfinite().all()
        assert_items_are_independent(encoder.double(), Inputs(x.values.double(), x.lengths))


def test_an_lstm_gives_all_states_of_every_step():
    cell, x = LSTM(3, 5).double(), batch()
    h, c = cell(x.values, x.lengths)
    for item, sequence in enumerate(rows(x)):
        for found, want in zip((h, c), lstm(cell, sequence), strict=True):
            torch.testing.assert_close(found[item, : len(sequence)], want, rtol=1e-10, atol=1e-12)
            assert (found[item, len(sequence) :] == 0).all()


def test_lstm_weights_are_those_of_torch():
    ours, cell = LSTM(3, 5), torch.nn.LSTMCell(3, 5)
    ours.load_state_dict(cell.state_dict())
    x = torch.randn(2, 1, 3)
    torch.testing.assert_close(ours(x)[0][:, 0], cell(x[:, 0])[0])
    assert max(p.abs().max() for p in LSTM(3, 100).parameters()) <= 0.1


@pytest.mark.parametrize("layers", [1, 3])
def test_an_lstm_encoder_reads_the_last_step_of_its_last_layer(layers):
    encoder, x = LSTMEncoder(3, 5, 4, layers).double(), batch()
    for found, h in zip(encoder(x), rows(x), strict=True):
        for cell in encoder.lstms:
            h, _ = lstm(cell, h)
        torch.testing.assert_close(found, linear(encoder.out, h[-1]), rtol=1e-10, atol=1e-12)
    assert LSTMEncoder(3, 5)(x.values.float()).shape == (4, 5)


def test_without_lengths_the_padding_is_read_as_public_code_does():
    encoder, x = LSTMEncoder(3, 5, 4).double(), batch()
    want = linear(encoder.out, lstm(encoder.lstms[0], x.values[1])[0][-1])
    torch.testing.assert_close(encoder(x.values)[1], want, rtol=1e-10, atol=1e-12)
    assert (encoder(x)[1] - want).abs().max() > 1e-4


def plain_gru(x, weights):
    w_ih, w_hh, b_ih, b_hh = weights
    hidden = w_hh.shape[1]
    h, found = x.new_zeros(hidden), []
    for step in x:
        own, past = w_ih @ step + b_ih, w_hh @ h + b_hh
        r = sigmoid(own[:hidden] + past[:hidden])
        z = sigmoid(own[hidden : 2 * hidden] + past[hidden : 2 * hidden])
        n = torch.tanh(own[2 * hidden :] + r * past[2 * hidden :])
        h = (1 - z) * n + z * h
        found.append(h)
    return torch.stack(found)


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_gru_encoder_reads_both_ends_or_the_mean(readout, bidirectional):
    encoder, x = GRUEncoder(3, 5, 4, bidirectional=bidirectional, readout=readout).double(), batch()
    weights = encoder.gru.all_weights
    for found, sequence in zip(encoder(x), rows(x), strict=True):
        states = [plain_gru(sequence, weights[0])]
        ends = [states[0][-1]]
        if bidirectional:
            states.append(plain_gru(sequence.flip(0), weights[1]).flip(0))
            ends.append(states[1][0])
        read = torch.cat(ends) if readout == "last" else torch.cat(states, 1).mean(0)
        torch.testing.assert_close(found, linear(encoder.out[1], read), rtol=1e-10, atol=1e-12)


def test_a_decoder_feeds_on_its_own_output():
    decoder, code = LSTMDecoder(6, 3).double(), torch.randn(4, 6).double()
    cell = torch.nn.LSTMCell(6, 6).double()
    cell.load_state_dict({k: v for k, v in decoder.state_dict().items() if not k.startswith("out")})
    h, state, want = code, (torch.zeros_like(code), torch.zeros_like(code)), []
    for _ in range(5):
        state = cell(h, state)
        h = state[0]
        want.append(linear(decoder.out, h))
    found = decoder(code, 5)
    torch.testing.assert_close(found, torch.stack(want, 1), rtol=1e-10, atol=1e-12)
    assert_gradients_reach_everything(decoder, found)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_those_of_mird():
    assert [count(LSTMEncoder(dim, 64, 64)) for dim in (33, 709)] == [29_504, 202_560]
    assert [count(LSTMDecoder(128, dim)) for dim in (33, 709)] == [136_353, 223_557]


@pytest.mark.parametrize("name", ["embed", "attention", "relu", "residual"])
def test_dropout_acts_in_training_alone(name):
    x = batch()
    encoder = TransformerEncoder(3, 8, 4, heads=2, dropouts=Dropouts(**{name: 0.5})).double()
    assert not torch.equal(encoder(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))
    for other in (LSTMEncoder(3, 5, 4, dropout=0.5).double(), GRUEncoder(3, 5, 4, dropout=0.5).double()):
        assert not torch.equal(other(x), other(x))
        assert torch.equal(other.eval()(x), other(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTMEncoder(0, 4), "dim must be at least 1, got 0"),
        (lambda: LSTMEncoder(3, 4, layers=0), "layers must be at least 1, got 0"),
        (lambda: GRUEncoder(3, readout="first"), "readout must be one of last, mean, got 'first'"),
        (lambda: GRUEncoder(3, dropout=1.0), "dropout must be a dropout rate"),
        (lambda: TransformerEncoder(3, 10, heads=4), "heads must divide dim 10, got 4"),
        (lambda: Dropouts(relu=-0.1), "relu must be a dropout rate"),
        (lambda: LSTMEncoder(3, 4)(torch.zeros(2, 5, 4)), "x must have 3 features per step, got 4"),
        (lambda: LSTMDecoder(4, 2)(torch.zeros(2, 3), 5), r"code must have shape \[batch, 4\], got \(2, 3\)"),
        (lambda: LSTMDecoder(4, 2)(torch.zeros(2, 4), 0), "steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
