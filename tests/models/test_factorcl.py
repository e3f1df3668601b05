"""FactorCL: the public code's structure, values of an untrained model, and which parameters get gradients."""

import dataclasses
import itertools
import math

import pytest
import torch

from models.batch import Batch, Inputs, Target
from models.data import Dataset, Modality
from models.factorcl import MAXIMISED, MINIMISED, FactorCLConfig, FactorCLSSL, FactorCLSUP, Settings, build_sup
from models.layers.encoders import MLPEncoder

SMALL = FactorCLConfig(num_classes=3, feature_dims=(8, 6), critic_hidden=(16, 16))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(kind, config=SMALL):
    torch.manual_seed(0)
    return kind(MLPEncoder(5, 12, 8, 1), MLPEncoder(4, 12, 6, 1), config)


def batch(size=10):
    generator = torch.Generator().manual_seed(1)
    inputs = {name: Inputs(torch.randn(size, dim, generator=generator)) for name, dim in (("a", 5), ("b", 4))}
    labels = torch.randint(3, (size,), generator=generator)
    generator = torch.Generator().manual_seed(2)
    view = {name: Inputs(torch.randn(size, dim, generator=generator)) for name, dim in (("a", 5), ("b", 4))}
    return Batch(inputs, labels, None, torch.arange(size), (view,))


def inner_loss(model, data):
    return model.inner_loss(model.inner_pairs(data)).total


def test_parameter_counts_equal_the_public_synthetic_model():
    sup = FactorCLSUP(MLPEncoder(100), MLPEncoder(100), FactorCLConfig(num_classes=20))
    assert count(sup.encoders[0]) == 642_688
    assert count(sup.heads1["infonce_x1x2"]) == 49_536
    assert count(sup.bounds["infonce_x1x2"]) == 394_753
    assert count(sup) == 4_039_686
    assert count(FactorCLSSL(MLPEncoder(100), MLPEncoder(100), FactorCLConfig())) == 4_411_398


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_a_fresh_model_has_a_total_loss_near_zero(kind):
    loss, terms = small(kind).loss(batch())
    assert abs(loss.item()) < 0.05
    assert set(terms) == {*MAXIMISED, *MINIMISED}


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_the_loss_is_the_signed_sum_of_the_terms(kind):
    loss, terms = small(kind).loss(batch())
    expected = sum(terms[name] for name in MINIMISED) - sum(terms[name] for name in MAXIMISED)
    torch.testing.assert_close(loss.detach(), expected)


def test_weight_two_counts_the_terms_of_u_twice():
    model = small(FactorCLSUP, dataclasses.replace(SMALL, u_terms_weight=2.0))
    once, terms = small(FactorCLSUP).loss(batch())
    twice, _ = model.loss(batch())
    torch.testing.assert_close(twice - once, terms["club_x1x2"] - terms["infonce_x1x2_cond"])


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_the_inner_loss_reaches_the_club_critics_alone(kind):
    model = small(kind)
    inner_loss(model, batch()).backward()
    phi = {id(parameter) for parameter in model.inner_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in phi), name


def test_every_parameter_outside_the_club_critics_learns_from_the_loss():
    model = small(FactorCLSUP)
    model.loss(batch()).total.backward()
    phi = {id(parameter) for parameter in model.inner_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in phi:
            assert parameter.grad is not None, name


def test_factors_concatenate_the_heads_of_their_terms():
    model, data = small(FactorCLSUP), batch()
    x1, x2 = data.inputs.values()
    s1, u1, s2, u2 = model.factors(x1, x2)
    assert [part.shape[1] for part in (s1, u1, s2, u2)] == [16, 24, 12, 18]
    e1, _ = model.encode(x1, x2)
    torch.testing.assert_close(s1[:, :8], model.heads1["infonce_x1x2"](e1))
    torch.testing.assert_close(u1[:, 8:16], model.heads1["infonce_x1y"](e1))


OPTIONS = {
    "label": ("scalar", "one_hot"),
    "condition_sides": ("first", "both"),
    "anchor": ("first", "second"),
    "conditional_negatives": ("batch", "label"),
}


@pytest.mark.parametrize("values", list(itertools.product(*OPTIONS.values())), ids="-".join)
def test_every_documented_choice_gives_a_finite_loss_and_gradient(values):
    model = small(FactorCLSUP, dataclasses.replace(SMALL, **dict(zip(OPTIONS, values, strict=True))))
    loss, _ = model.loss(batch())
    loss.backward()
    inner_loss(model, batch()).backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


SHARED = dataclasses.replace(SMALL, club_critic="shared")


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_shared_critics_serve_both_terms_of_a_pair_and_learn_in_the_inner_loop_alone(kind):
    model, own = small(kind, SHARED), small(kind)
    assert count(own) - count(model) == sum(count(own.bounds[name]) for name in MINIMISED)
    phi = {id(parameter) for parameter in model.inner_parameters()}
    assert phi == {id(p) for name in ("infonce_x1x2", "infonce_x1x2_cond") for p in model.bounds[name].parameters()}
    inner_loss(model, batch()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in phi), name


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_shared_critics_are_fitted_on_the_heads_of_both_terms(kind):
    model = small(kind, SHARED)
    pairs = model._pairs(("infonce_x1x2", "club_x1x2", "infonce_x1x2_cond", "club_x1x2_cond"), batch())
    expected = 0.0
    for name, (a, b) in pairs.items():
        scores = model.bounds[name].critic(a, b).double()  # [x, y]; every y is compared with all x
        expected = expected - (scores.diag() - scores.logsumexp(0)).mean() - math.log(len(scores))
    torch.testing.assert_close(inner_loss(model, batch()).double(), expected, atol=1e-5, rtol=0)


def test_ssl_conditions_the_club_term_on_the_augmented_views():
    terms = {}
    for condition in ("augmented", "repeated"):
        model = small(FactorCLSSL, dataclasses.replace(SMALL, ssl_club_condition=condition))
        terms[condition] = [
            model.terms(data)["club_x1x2_cond"].item() for data in (batch(), batch()._replace(views=(batch().inputs,)))
        ]
    assert terms["augmented"][0] != terms["augmented"][1]
    assert terms["repeated"][0] == terms["repeated"][1]


@pytest.mark.parametrize("name", ["infonce_x1x2_cond", "club_x1x2_cond"])
@pytest.mark.parametrize("method", ["forward", "learning_loss"])
def test_label_negatives_do_not_compare_classes(name, method):
    """A class is weighted by its number of samples; a class with a single sample has no negatives and adds nothing."""
    model, data = small(FactorCLSUP, dataclasses.replace(SMALL, conditional_negatives="label")), batch()
    y = data.target
    y[y == y[0]] = (y[0] + 1) % SMALL.num_classes
    y[0] = (y[0] - 1) % SMALL.num_classes  # the only one of its class
    assert (y == y[0]).sum() == 1
    a, b = model._pairs((name,), data)[name]
    plain = getattr(small(FactorCLSUP).bounds[name], method)
    classes = [torch.nonzero(y == label).flatten() for label in y.unique()]
    want = sum(len(rows) / len(y) * plain(a[rows], b[rows]) for rows in classes if len(rows) > 1)
    found = model._estimate(name, a, b, y, method)
    torch.testing.assert_close(found, want)
    grads = zip(torch.autograd.grad(found, (a, b), retain_graph=True), torch.autograd.grad(want, (a, b)), strict=True)
    for f, w in grads:
        torch.testing.assert_close(f, w, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    "change", [{"label": "two_hot"}, {"anchor": "third"}, {"club_critic": "none"}, {"num_classes": 1}]
)
def test_an_unknown_choice_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


def test_ssl_refuses_what_needs_labels_or_views():
    with pytest.raises(ValueError, match="conditional_negatives"):
        small(FactorCLSSL, dataclasses.replace(SMALL, conditional_negatives="label"))
    with pytest.raises(ValueError, match="views"):
        small(FactorCLSSL).loss(batch()._replace(views=()))


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_rows_that_lack_a_modality_take_no_part_in_a_loss(kind):
    model, data = small(kind), batch()
    here = torch.arange(10) % 3 > 0
    lame = data._replace(inputs=data.inputs | {"b": data.inputs["b"]._replace(present=here)})
    for phase in model.phases():
        wanted, found = data.take(here), phase.usable(lame)
        assert torch.equal(found.rows, wanted.rows)
        torch.testing.assert_close(found.inputs["a"].values, wanted.inputs["a"].values)


def test_representations_are_the_factors_side_by_side():
    model, data = small(FactorCLSUP), batch()
    parts = model.representations(data)
    s1, u1, s2, u2 = model.factors(*data.inputs.values())
    torch.testing.assert_close(parts["full"], torch.cat([s1, u1, s2, u2], 1))
    torch.testing.assert_close(parts["S"], torch.cat([s1, s2], 1))
    assert model.headline in parts and set(model.shown) <= set(parts)


def test_one_modality_is_refused_by_name():
    modalities = (Modality("pose", torch.zeros(4, 2)),)
    data = Dataset("d", modalities, torch.arange(4) % 2, Target.classes(2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="two modalities or more, the data has one: pose"):
        build_sup(Settings(), data)
