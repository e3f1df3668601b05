"""FactorCL's settings for single terms: critics, clamped and weighted upper bounds, ablated objectives."""

import dataclasses
import math

import pytest
import torch

from models.batch import Target
from models.data import Dataset, Modality
from models.factorcl import MAXIMISED, MINIMISED, OBJECTIVES, FactorCLSSL, FactorCLSUP, Settings, build_sup
from models.factorcl.critics import ProjectedCritic
from tests.models.test_factorcl import SMALL, batch, inner_loss, small

KINDS = [FactorCLSUP, FactorCLSSL]


def with_(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("critic", ["cosine", "dot"])
@pytest.mark.parametrize("anchor", ["first", "second"])
def test_inner_product_terms_equal_their_formulas_on_materialised_scores(kind, critic, anchor):
    model, data = small(kind, with_(critic=critic, temperature=0.3, critic_dim=7, anchor=anchor)), batch()
    terms = model.terms(data)
    for name, (a, b) in model._pairs(tuple(terms), data).items():
        projected = model.bounds[name].critic
        u, v = projected.x_projection(a).double(), projected.y_projection(b).double()
        if critic == "cosine":
            u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
        scores = u @ v.T / 0.3
        if name in MAXIMISED:
            want = (scores.diag() - scores.logsumexp(1 if anchor == "first" else 0)).mean() + math.log(len(scores))
        else:
            want = scores.diag().mean() - scores.mean()
        torch.testing.assert_close(terms[name].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{"critic": "cosine"}, {"critic": "concat"}, {"critics": {"infonce_x1x2": "dot"}, "anchor": "first"}],
    ids=["cosine", "concat", "mixed"],
)
def test_terms_in_one_call_have_the_gradients_of_separate_calls(kind, changes):
    model, data = small(kind, with_(**changes)), batch()
    together = torch.autograd.grad(model.loss(data).total, list(model.parameters()), allow_unused=True)
    pairs = model._pairs(model.config.terms, data)
    apart = sum(
        (1 if name in MINIMISED else -1) * model._estimate(name, *pair, data.target) for name, pair in pairs.items()
    )
    for found, want in zip(
        together, torch.autograd.grad(apart, list(model.parameters()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_in_one_call_equals_the_learning_losses_of_the_bounds(kind):
    model, data = small(kind), batch()
    pairs, y = model.inner_pairs(data)
    found = model._estimates(pairs, y, fitting=True)
    for name, pair in pairs.items():
        torch.testing.assert_close(found[name], model.bounds[name].learning_loss(*pair))


@pytest.mark.parametrize("kind", KINDS)
def test_critics_are_chosen_per_term(kind):
    model = small(kind, with_(critics={"infonce_x1x2": "cosine"}))
    assert isinstance(model.bounds["infonce_x1x2"].critic, ProjectedCritic)
    assert not any(isinstance(model.bounds[name].critic, ProjectedCritic) for name in MINIMISED)
    model.loss(batch()).total.backward()
    inner_loss(model, batch()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_upper_bound_below_the_floor_is_not_followed_and_reported_as_it_is():
    model, data = small(FactorCLSUP), batch()
    terms = model.loss(data).terms
    below, above = sorted(MINIMISED, key=lambda name: terms[name].item())
    floor = (terms[below] + terms[above]).item() / 2
    clamped = small(FactorCLSUP, with_(club_floor=floor))
    loss, found = clamped.loss(data)
    assert found == terms
    loss.backward()
    heads = {name: clamped.heads1[name][0].weight.grad for name in MINIMISED}
    assert heads[below].abs().sum() == 0 and heads[above].abs().sum() > 0
    torch.testing.assert_close(loss.detach(), floor + terms[above] - sum(terms[name] for name in MAXIMISED))


def test_the_weight_of_the_upper_bounds_scales_them_alone():
    loss, terms = small(FactorCLSUP, with_(club_weight=0.1)).loss(batch())
    want = 0.1 * sum(terms[name] for name in MINIMISED) - sum(terms[name] for name in MAXIMISED)
    torch.testing.assert_close(loss.detach(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_ablation_has_the_terms_heads_and_parts_of_its_objective_alone(kind, objective):
    model = small(kind, with_(objective=objective))
    terms = model.loss(batch()).terms
    assert set(terms) == set(OBJECTIVES[objective]) == set(model.heads1) | set(model.heads2)
    phases = [phase.name for phase in model.phases()]
    assert ("club" in phases) == any(name in MINIMISED for name in terms)
    parts = model.representations(batch())
    assert all(part.shape[1] for part in parts.values()) and {"encoder", "full"} <= set(parts)
    assert ("S" in parts) == any(name in terms for name in ("infonce_x1x2", "club_x1x2_cond"))


def test_settings_reach_the_model():
    rows = torch.arange(8)
    data = Dataset(
        "d",
        tuple(Modality(name, torch.randn(8, 3)) for name in "ab"),
        rows % 2,
        Target.classes(2),
        torch.zeros(8, dtype=torch.int64),
    )
    chosen = {"critic": "cosine", "club_floor": 0.0, "club_weight": 0.5, "objective": "S", "critic_dim": 5}
    model = build_sup(Settings(**chosen, representation="encoder", conditional_negatives="label"), data)
    assert model.headline == "encoder"
    assert {name: getattr(model.config, name) for name in chosen} == chosen
    assert model.bounds["club_x1x2_cond"].condition == "group"
    published = Settings(preset="public-code").architecture(3)
    assert (published.critic, published.club_floor, published.club_weight) == ("concat", None, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"critic": "mlp"},
        {"critics": {"infonce": "dot"}},
        {"critics": {"club_x1x2": "mlp"}},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"club_weight": -1.0},
        {"club_weight": math.inf},
        {"club_floor": math.nan},
        {"heads": "one"},
        {"objective": "U3"},
        {"critic_dim": 0},
    ],
)
def test_unknown_choices_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        with_(**change)
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings(**change)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_the_inner_step_size_is_positive(value):
    with pytest.raises(ValueError, match="critic_lr must be positive"):
        Settings(critic_lr=value)


def test_a_pair_that_shares_a_critic_has_one_kind():
    with pytest.raises(ValueError, match="must agree"):
        with_(club_critic="shared", critics={"club_x1x2": "dot"})


def test_a_zero_row_of_16_bits_has_finite_cosines_and_gradients():
    critic = ProjectedCritic(4, 4, 3, 0.1, normalize=True).half()
    torch.nn.init.zeros_(critic.x_projection.bias)
    x, y = torch.randn(2, 5, 4).half().unbind()
    x[0] = 0
    a, b, _ = critic.features(x, y)
    (a @ b.mT).sum().backward()
    assert a.isfinite().all() and all(p.grad.isfinite().all() for p in critic.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", [*MAXIMISED, *MINIMISED])
def test_any_single_term_can_be_left_out(kind, term):
    model = small(kind, with_(without=(term,)))
    loss, terms = model.loss(batch())
    assert set(terms) == {*MAXIMISED, *MINIMISED} - {term}
    assert term not in model.bounds and term not in model.heads1 and term not in model.heads2
    assert loss.isfinite() and model.factors(*batch().inputs.values()).u1.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_factor_serve_all_its_terms(kind):
    model, data = small(kind, with_(heads="factor")), batch()
    assert set(model.heads1) == set(model.heads2) == {"S", "U"}
    s1, u1, s2, u2 = model.factors(*data.inputs.values())
    assert [part.shape[1] for part in (s1, u1, s2, u2)] == [8, 8, 6, 6]
    pairs = model._pairs(model.config.terms, data)
    for term, factors in (("infonce_x1x2", (s1, s2)), ("club_x1x2", (u1, u2))):
        for found, wanted in zip(pairs[term], factors, strict=True):
            torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pairs["infonce_x1y"][0], u1)


def test_settings_and_the_model_read_the_same_choices():
    chosen = {"heads": "factor", "without": ("club_x1x2",), "temperature": 0.7}
    found = Settings(**chosen).architecture(3)
    assert {name: getattr(found, name) for name in chosen} == chosen
    with pytest.raises(ValueError, match="without"):
        Settings(without=("club",))
    with pytest.raises(ValueError, match="leaves no term"):
        Settings(objective="S", without=("infonce_x1x2", "club_x1x2_cond"))
