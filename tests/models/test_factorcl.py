"""FactorCL: structure of the public code, fresh-model behaviour, who gets gradients."""

import dataclasses
import itertools
import math

import pytest
import torch

from models.data import Batch, Inputs
from models.encoders import MLPEncoder
from models.factorcl import MAXIMISED, MINIMISED, FactorCLConfig, FactorCLSSL, FactorCLSUP

SMALL = FactorCLConfig(num_classes=3, feature_dims=(8, 6), critic_hidden=(16, 16))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small(kind, config=SMALL):
    torch.manual_seed(0)
    return kind(MLPEncoder(5, 12, 8, 1), MLPEncoder(4, 12, 6, 1), config)


def batch(size=10):
    generator = torch.Generator().manual_seed(1)
    return Batch(
        Inputs(torch.randn(size, 5, generator=generator)),
        Inputs(torch.randn(size, 4, generator=generator)),
        torch.randint(3, (size,), generator=generator),
    )


def views(size=10):
    generator = torch.Generator().manual_seed(2)
    return [(Inputs(torch.randn(size, 5, generator=generator)), Inputs(torch.randn(size, 4, generator=generator)))]


def test_parameter_counts_equal_the_public_synthetic_model():
    sup = FactorCLSUP(MLPEncoder(100), MLPEncoder(100), FactorCLConfig(num_classes=20))
    assert count(sup.encoders[0]) == 642_688
    assert count(sup.heads1["infonce_x1x2"]) == 49_536
    assert count(sup.bounds["infonce_x1x2"]) == 394_753
    assert count(sup) == 4_039_686
    assert count(FactorCLSSL(MLPEncoder(100), MLPEncoder(100), FactorCLConfig())) == 4_411_398


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_a_fresh_model_has_a_total_loss_near_zero(kind):
    loss, terms = small(kind).loss(batch(), views())
    assert abs(loss.item()) < 0.05
    assert set(terms) == {*MAXIMISED, *MINIMISED}


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_the_loss_is_the_signed_sum_of_the_terms(kind):
    loss, terms = small(kind).loss(batch(), views())
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
    model.inner_loss(batch(), views()).backward()
    phi = {id(parameter) for parameter in model.inner_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in phi), name


def test_every_parameter_outside_the_club_critics_learns_from_the_loss():
    model = small(FactorCLSUP)
    model.loss(batch())[0].backward()
    phi = {id(parameter) for parameter in model.inner_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in phi:
            assert parameter.grad is not None, name


def test_factors_concatenate_the_heads_of_their_terms():
    model, data = small(FactorCLSUP), batch()
    s1, u1, s2, u2 = model.factors(data.x1, data.x2)
    assert [part.shape[1] for part in (s1, u1, s2, u2)] == [16, 24, 12, 18]
    e1, _ = model.encode(data.x1, data.x2)
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
    model.inner_loss(batch()).backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


SHARED = dataclasses.replace(SMALL, club_critic="shared")


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_shared_critics_serve_both_terms_of_a_pair_and_learn_in_the_inner_loop_alone(kind):
    model, own = small(kind, SHARED), small(kind)
    assert count(own) - count(model) == sum(count(own.bounds[name]) for name in MINIMISED)
    phi = {id(parameter) for parameter in model.inner_parameters()}
    assert phi == {id(p) for name in ("infonce_x1x2", "infonce_x1x2_cond") for p in model.bounds[name].parameters()}
    model.inner_loss(batch(), views()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in phi), name


@pytest.mark.parametrize("kind", [FactorCLSUP, FactorCLSSL])
def test_shared_critics_are_fitted_on_the_heads_of_both_terms(kind):
    model = small(kind, SHARED)
    pairs = model._pairs(("infonce_x1x2", "club_x1x2", "infonce_x1x2_cond", "club_x1x2_cond"), batch(), views())
    expected = 0.0
    for name, (a, b) in pairs.items():
        scores = model.bounds[name].critic(a, b).double()  # [x, y]; every y is contrasted with all x
        expected = expected - (scores.diag() - scores.logsumexp(0)).mean() - math.log(len(scores))
    torch.testing.assert_close(model.inner_loss(batch(), views()).double(), expected, atol=1e-5, rtol=0)


def test_ssl_conditions_the_club_term_on_the_augmented_views():
    terms = {}
    for condition in ("augmented", "repeated"):
        model = small(FactorCLSSL, dataclasses.replace(SMALL, ssl_club_condition=condition))
        terms[condition] = [
            model.terms(batch(), v)["club_x1x2_cond"].item() for v in (views(), [(batch().x1, batch().x2)])
        ]
    assert terms["augmented"][0] != terms["augmented"][1]
    assert terms["repeated"][0] == terms["repeated"][1]


@pytest.mark.parametrize("name", ["infonce_x1x2_cond", "club_x1x2_cond"])
@pytest.mark.parametrize("method", ["forward", "learning_loss"])
def test_label_negatives_do_not_compare_classes(name, method):
    """Each class weighs as often as it occurs; a class with a single sample has no negatives and adds nothing."""
    model, data = small(FactorCLSUP, dataclasses.replace(SMALL, conditional_negatives="label")), batch()
    data.y[data.y == data.y[0]] = (data.y[0] + 1) % SMALL.num_classes
    data.y[0] = (data.y[0] - 1) % SMALL.num_classes  # the only one of its class
    assert (data.y == data.y[0]).sum() == 1
    a, b = model._pairs((name,), data, [])[name]
    plain = getattr(small(FactorCLSUP).bounds[name], method)
    classes = [torch.nonzero(data.y == label).flatten() for label in data.y.unique()]
    want = sum(len(rows) / len(data.y) * plain(a[rows], b[rows]) for rows in classes if len(rows) > 1)
    found = model._estimate(name, a, b, data.y, method)
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
        small(FactorCLSSL).loss(batch())
