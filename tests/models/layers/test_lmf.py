"""Low-rank fusion against the full tensor product; LMF and EF-LSTM step by step."""

import pytest
import torch

from models.data import Inputs
from models.layers import EFLSTM, LMF, LowRankFusion, LSTMEncoder, PooledEncoder
from tests.models.layers.checks import (
    aligned,
    assert_gradients_reach_everything,
    assert_items_are_independent,
    assert_padding_is_never_read,
    draw,
    linear,
    lstm,
    needs_utd_mhad,
    refilled,
    rows,
    utd_batch,
)


def lmf():
    return LMF([PooledEncoder(3, 4), PooledEncoder(2, 3), LSTMEncoder(5, 6, 3)], 2, rank=3).double()


def unaligned():
    return [draw(lengths, dim) for lengths, dim in (([4, 1, 6], 3), ([9, 5, 1], 2), ([2, 7, 8], 5))]


def same_lengths():
    return [draw([4, 1, 6], dim) for dim in (3, 2, 5)]


@pytest.mark.parametrize("dims", [(4, 3), (2, 3, 4)])
def test_fusion_is_the_full_tensor_read_out_by_a_tensor_of_low_rank(dims):
    fusion = LowRankFusion(dims, 5, rank=3).double()
    torch.nn.init.normal_(fusion.fusion_bias)
    z = [torch.randn(6, dim).double() for dim in dims]
    letters = "ijk"[: len(dims)]
    factors = ",".join(f"{letter}o" for letter in letters)
    readout = sum(
        fusion.fusion_weight[0, r] * torch.einsum(f"{factors}->{letters}o", *(w[r] for w in fusion.weights))
        for r in range(3)
    )
    for item in range(6):
        ones = [torch.cat([torch.ones(1).double(), v[item]]) for v in z]
        outer = torch.einsum(f"{','.join(letters)}->{letters}", *ones)
        want = torch.einsum(f"{letters},{letters}o->o", outer, readout) + fusion.fusion_bias[0]
        torch.testing.assert_close(fusion(*z)[item], want, rtol=1e-10, atol=1e-12)


def test_fusion_has_the_parameters_of_its_factors():
    fusion = LowRankFusion((32, 16, 64), 7, rank=4)
    assert sum(p.numel() for p in fusion.parameters()) == (33 + 17 + 65) * 4 * 7 + 4 + 7
    assert [tuple(w.shape) for w in fusion.factors()] == [(4, 33, 7), (4, 17, 7), (4, 65, 7)]
    assert (fusion.fusion_bias == 0).all()


def test_a_pooled_encoder_averages_normalises_and_applies_three_layers():
    encoder, x = PooledEncoder(3, 4).double(), draw([4, 1, 6], 3)
    means = torch.stack([sequence.mean(0) for sequence in rows(x)])
    h = (means - means.mean(0)) / (means.var(0, correction=0) + 1e-5).sqrt()
    for layer in (encoder.net[2], encoder.net[4], encoder.net[6]):
        h = linear(layer, h).clamp(min=0)
    torch.testing.assert_close(encoder(x), h, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(encoder(means), h, rtol=1e-8, atol=1e-10)


def plain_ef_lstm(model, item):
    h = torch.cat(list(item), 1)
    for cell in model.encoder.lstms:
        h, _ = lstm(cell, h)
    return linear(model.out[3], linear(model.out[0], h[-1]).clamp(min=0))


@pytest.mark.parametrize("layers", [1, 2])
def test_early_fusion_reads_the_last_step(layers):
    model, inputs = EFLSTM((3, 2, 5), 2, 6, layers, dropout=0.0).double(), same_lengths()
    for found, item in zip(model(*inputs), zip(*map(rows, inputs), strict=True), strict=True):
        torch.testing.assert_close(found, plain_ef_lstm(model, item), rtol=1e-10, atol=1e-12)
    whole = model(*(x.values for x in inputs))[1]
    want = plain_ef_lstm(model, [x.values[1] for x in inputs])
    torch.testing.assert_close(whole, want, rtol=1e-10, atol=1e-12)


def test_early_fusion_has_the_parameters_of_its_parts():
    # One LSTMCell(325, 128), Linear(128, 128), Linear(128, 1).
    want = 4 * 128 * (325 + 128 + 2) + 128 * 129 + 129
    assert sum(p.numel() for p in EFLSTM((300, 5, 20)).parameters()) == want


def test_padding_is_never_read():
    assert_padding_is_never_read(lmf(), *unaligned())
    assert_padding_is_never_read(EFLSTM((3, 2, 5), 2, 6, 2, dropout=0.0).double(), *same_lengths())


def test_a_running_mean_never_sees_the_padding():
    clean, dirty = lmf().train(), lmf().train()
    dirty.load_state_dict(clean.state_dict())
    clean(*unaligned_fixed(0.0))
    dirty(*unaligned_fixed(float("nan")))
    for one, other in zip(clean.buffers(), dirty.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def unaligned_fixed(fill):
    torch.manual_seed(1)
    return [refilled(x, fill) for x in unaligned()]


def test_an_item_does_not_depend_on_its_batch():
    assert_items_are_independent(lmf(), *unaligned())
    assert_items_are_independent(EFLSTM((3, 2, 5), 2, 6, dropout=0.0).double(), *same_lengths())


def test_gradients_reach_every_parameter():
    torch.manual_seed(2)
    model = lmf()
    assert_gradients_reach_everything(model, model(*unaligned()))
    model = EFLSTM((3, 2, 5), 2, 6, 2, dropout=0.0).double()
    assert_gradients_reach_everything(model, model(*same_lengths()))


def test_dropout_acts_in_training_alone():
    for model, inputs in (
        (LMF([PooledEncoder(3, 4, 0.5), LSTMEncoder(5, 6, 3, dropout=0.5)]).double(), unaligned()[::2]),
        (EFLSTM((3, 2, 5), 2, 6).double(), same_lengths()),
    ):
        assert not torch.equal(model(*inputs), model(*inputs))
        assert torch.equal(model.eval()(*inputs), model(*inputs))


@needs_utd_mhad
def test_real_modalities():
    inputs = [Inputs(x.values.double(), x.lengths) for x in utd_batch()]
    model = LMF([LSTMEncoder(60, 8, 4), PooledEncoder(6, 4)], 27).double()
    assert model(*inputs).shape == (4, 27)
    assert_items_are_independent(model, *inputs)
    early = EFLSTM((60, 6), 27, 8, dropout=0.0).double()
    assert early.features(*aligned(inputs)).shape == (4, 8)
    assert_items_are_independent(early, *aligned(inputs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankFusion((3,), 2, rank=0), "rank must be at least 1, got 0"),
        (lambda: LowRankFusion((), 2), "dims must be at least 1"),
        (lambda: LowRankFusion((3, 4), 2)(torch.zeros(2, 3)), "vectors must be one per modality, 2, got 1"),
        (lambda: LowRankFusion((3, 4), 2)(*[torch.zeros(2, 3)] * 2), r"vectors\[1\] must have shape \[batch, 4\]"),
        (lambda: PooledEncoder(3, 4)(torch.zeros(2, 4)), "x must have 3 features, got 4"),
        (lambda: PooledEncoder(3, 4, 1.0), "dropout must be a dropout rate"),
        (lambda: lmf()(torch.zeros(1, 2, 3)), "inputs must be one per modality, 3, got 1"),
        (lambda: EFLSTM((), 2), "dims must be at least 1"),
        (lambda: EFLSTM((3, 2))(torch.zeros(1, 2, 3)), "inputs must be one per modality, 2, got 1"),
        (lambda: EFLSTM((3, 2))(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2)), r"inputs\[1\] must be aligned"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
