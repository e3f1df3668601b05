"""The adaptation gate and the word-level sparsemax shift against their equations, word by word."""

import math

import pytest
import torch

from models.data import Inputs
from models.layers import AdaptationGate, WordShift
from tests.models.layers.checks import (
    aligned,
    assert_gradients_reach_everything,
    assert_items_are_independent,
    assert_padding_is_never_read,
    draw,
    layer_norm,
    linear,
    needs_utd_mhad,
    refilled,
    rows,
    softmax,
    sparsemax,
    utd_batch,
)

TEXT, DIMS = 8, (3, 5)


def gate(**options):
    return AdaptationGate(TEXT, DIMS, dropout=0.0, **options).double()


def shift(**options):
    return WordShift(TEXT, DIMS, dropout=0.0, **options).double()


def aligned_batch():
    return [draw([4, 1, 6], dim) for dim in (TEXT, *DIMS)]


def batch():
    return [draw(lengths, dim) for lengths, dim in (([4, 1, 6], TEXT), ([9, 5, 1], 3), ([2, 7, 8], 5))]


def plain_gate(model, word, others):
    h = torch.zeros_like(word)
    for opening, linear_shift, x in zip(model.gates, model.shifts, others, strict=True):
        h = h + linear(opening, torch.cat([x, word])).clamp(min=0) * linear(linear_shift, x)
    size = h.square().sum().sqrt()
    size = size if size > 0 else torch.ones_like(size)
    alpha = min(model.beta * word.square().sum().sqrt() / (size + 1e-6), torch.ones_like(size))
    assert alpha <= 1
    return layer_norm(model.norm, word + alpha * h)


@pytest.mark.parametrize("beta", [1.0, 0.01, 0.0])
def test_every_word_follows_the_equations(beta):
    model, inputs = gate(beta=beta), aligned_batch()
    found = model(*inputs)
    for item, (words, *others) in enumerate(zip(*map(rows, inputs), strict=True)):
        for t, word in enumerate(words):
            want = plain_gate(model, word, [x[t] for x in others])
            torch.testing.assert_close(found[item, t], want, rtol=1e-10, atol=1e-12)
        assert (found[item, len(words) :] == 0).all()


def test_without_beta_nothing_is_shifted():
    model, inputs = gate(beta=0.0), aligned_batch()
    torch.testing.assert_close(model(*inputs)[2], model.norm(inputs[0].values[2]))


def test_a_large_shift_is_cut_to_beta_times_the_word():
    model, (text, *others) = gate(beta=0.5), [x.values for x in aligned_batch()]
    model.norm = torch.nn.Identity()
    text = torch.randn(3, 6, TEXT).double()
    moved = model(text, *(x * 1e6 for x in others)) - text
    moved_far = moved[(others[0] != 0).any(2)]
    want = 0.5 * text[(others[0] != 0).any(2)].norm(dim=1)
    torch.testing.assert_close(moved_far.norm(dim=1), want, rtol=1e-6, atol=0)


def test_a_shift_of_zero_leaves_the_word_and_a_finite_gradient():
    model, inputs = gate(), aligned_batch()
    with torch.no_grad():
        for linear_shift in model.shifts:
            linear_shift.weight.zero_()
            linear_shift.bias.zero_()
    words = inputs[0].values.requires_grad_()
    found = model(inputs[0], *inputs[1:])
    torch.testing.assert_close(found[2], model.norm(words[2]))
    found.square().sum().backward()
    assert words.grad.isfinite().all() and model.shifts[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("normalizer", ["sparsemax", "softmax"])
@pytest.mark.parametrize("key_bias", [False, True])
def test_words_look_for_their_frames(normalizer, key_bias):
    model, inputs = shift(normalizer=normalizer, key_bias=key_bias), batch()
    weigh = sparsemax if normalizer == "sparsemax" else softmax
    found = model(*inputs)
    for item, (words, *others) in enumerate(zip(*map(rows, inputs), strict=True)):
        for t, word in enumerate(words):
            read = [
                weigh(torch.stack([word @ linear(key, frame) for frame in frames])) @ frames
                for key, frames in zip(model.keys, others, strict=True)
            ]
            torch.testing.assert_close(found[item, t], plain_gate(model.gate, word, read), rtol=1e-10, atol=1e-12)
        assert (found[item, len(words) :] == 0).all()


def test_the_bias_of_the_keys_changes_nothing():
    model, inputs = shift(key_bias=True), batch()
    before = model(*inputs)
    with torch.no_grad():
        model.keys[0].bias += 3
    torch.testing.assert_close(model(*inputs), before)
    before.square().sum().backward()
    assert model.keys[0].bias.grad.abs().max() < 1e-10


def test_plain_tensors_let_words_look_at_padding_as_public_code_does():
    model, inputs = shift(), batch()
    inputs[0] = refilled(inputs[0], 1.0)  # like the embedding of [PAD], padding is not 0
    found, whole = model(*inputs), model(*(x.values for x in inputs))
    words, frames = inputs[0].values[1], [x.values[1] for x in inputs[1:]]
    read = [
        sparsemax(torch.stack([words[3] @ linear(key, f) for f in x])) @ x
        for key, x in zip(model.keys, frames, strict=True)
    ]
    torch.testing.assert_close(whole[1, 3], plain_gate(model.gate, words[3], read), rtol=1e-10, atol=1e-12)
    assert (found[1, 1:] == 0).all()
    assert (found[0, :4] - whole[0, :4]).abs().max() > 1e-4  # zero frames got a share of the weight


@pytest.mark.parametrize("make", [gate, shift])
def test_padding_is_never_read(make):
    assert_padding_is_never_read(make(), *(aligned_batch() if make is gate else batch()))


@pytest.mark.parametrize("make", [gate, shift])
def test_an_item_does_not_depend_on_its_batch(make):
    assert_items_are_independent(make(), *(aligned_batch() if make is gate else batch()))


@pytest.mark.parametrize("make", [gate, shift])
def test_gradients_reach_every_parameter(make):
    model, inputs = make(), aligned_batch() if make is gate else batch()
    assert_gradients_reach_everything(model, model(*inputs) * torch.randn(TEXT).double())


def test_dropout_acts_in_training_alone():
    model, inputs = AdaptationGate(TEXT, DIMS, dropout=0.5).double(), aligned_batch()
    assert not torch.equal(model(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_those_of_mird_and_mag_bert():
    assert count(WordShift(768, (33, 709), key_bias=True)) == 2_895_360
    assert count(WordShift(768, (33, 709))) == 2_895_360 - 2 * 768
    # Two gates from [d; 768], two linear layers from d, one layer norm; MOSI's visual 47 and acoustic 74.
    assert count(AdaptationGate(768, (47, 74))) == (2 * 768 + 2 * (47 + 74)) * 768 + 4 * 768 + 2 * 768


@needs_utd_mhad
def test_real_frames_shift_words_as_many_as_the_first_modality_has_frames():
    skeleton, inertial = utd_batch()
    model = WordShift(60, (6,), dropout=0.0)
    assert model(skeleton, inertial).shape == skeleton.values.shape
    doubled = [Inputs(x.values.double(), x.lengths) for x in (skeleton, inertial)]
    assert_items_are_independent(model.double(), *doubled)
    assert_items_are_independent(AdaptationGate(60, (6,), dropout=0.0).double(), *aligned(doubled))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptationGate(8, ()), "dims must be at least 1"),
        (lambda: AdaptationGate(8, (3,), beta=-1.0), "beta must not be negative, got -1.0"),
        (lambda: AdaptationGate(8, (3,), beta=math.nan), "beta must not be negative, got nan"),
        (lambda: AdaptationGate(8, (3,), dropout=1.0), "dropout must be a dropout rate"),
        (lambda: WordShift(8, (3,), normalizer="entmax"), "normalizer must be one of sparsemax, softmax"),
        (lambda: gate()(torch.zeros(1, 2, 8)), "others must be one per modality, 2, got 0"),
        (lambda: shift()(torch.zeros(1, 2, 8)), "others must be one per modality, 2, got 0"),
        (lambda: shift()(*(torch.zeros(1, 2, d) for d in (8, 3, 4))), r"others\[1\] must have 5 features per step"),
        (lambda: gate()(*(torch.zeros(1, 2 + (d == 5), d) for d in (8, 3, 5))), r"others\[1\] must be aligned"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
