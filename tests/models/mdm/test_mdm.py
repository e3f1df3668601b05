"""The dependency penalty: all base models, weight 0, shuffles and lengths, which parameters get gradients, balance,
controls, settings."""

import dataclasses
import math

import pytest
import torch

from models.batch import Batch, Inputs, Target
from models.data import Dataset, Modality
from models.mdm.shuffle import with_shuffled
from models.model import Model, Phase
from models.registry import build
from models.settings import from_dict
from models.training.fit import fit, load_run
from tests.models.helpers import SMALL, mixed

BASES = ("early-fusion", "late-fusion", "ef-lstm", "lmf", "mfn", "mult")
CRITIC = {"hidden": [8]}


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


def config(base="mfn", training=None, **model):
    tree = {
        "model": {"name": "mdm", "base": {"name": base, **SMALL[base]}, **CRITIC, **model},
        "data": {"name": "synthetic"},
        "training": {"epochs": 2, "batch_size": 16, "lr": 1e-2, **(training or {})},
    }
    return from_dict(tree)


def made(base="mfn", data=None, **model):
    settings = config(base, **{"ramp": 0, "negatives": 1.0, **model})
    return build(settings.name, settings.model, data or mixed(missing=False), 0)


@pytest.mark.parametrize("base", BASES)
def test_weight_zero_trains_any_base_bit_for_bit_as_without_the_penalty(base, tmp_path):
    data, settings = mixed(), config(base, weight=0.0, critic_steps=2)
    alone = dataclasses.replace(settings, name=base, model=settings.model.base.settings)
    wrapped = fit(settings, data, tmp_path / "mdm", progress=False).model
    plain = fit(alone, data, tmp_path / "base", progress=False).model
    found = wrapped.base.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, found[name]), name
    fresh = build(settings.name, settings.model, data, 0)
    assert not torch.equal(fresh.critic.mlp.layers[0].weight, wrapped.critic.mlp.layers[0].weight)


@pytest.mark.parametrize("measure", ["kl", "f", "wasserstein"])
@pytest.mark.parametrize("balance", ["none", "fused", "parameters"])
def test_the_base_gets_the_gradient_of_its_loss_less_the_weighted_measure(measure, balance):
    data = mixed(missing=False)
    model = made(data=data, measure=measure, balance=balance, weight=0.7).eval().double()  # no dropout
    model.training = True
    model.critic.mlp.layers[-1].weight.data.mul_(200)
    batch = data.batch(torch.arange(12)).to(torch.float64)
    state = model.measure.draws.get_extra_state()
    found = model.phases()[0].loss(batch)
    parameters = list(model.base.parameters())
    got = torch.autograd.grad(found.total, parameters)

    model.measure.draws.set_extra_state(state)
    indices = model.permutations(12)
    shuffled = with_shuffled(batch, indices)
    z = model.base.features(shuffled.inputs)
    t, s = model.scores(model._bounded(z)).split([12, 12])
    value = t.mean() - {"kl": s.exp().mean().log(), "f": (s - 1).exp().mean(), "wasserstein": s.mean()}[measure]
    task = model.base.loss_of(z[:12], batch).total
    torch.testing.assert_close(found.terms["dependency"], value.detach())
    places = [z] if balance == "fused" else parameters
    lengths = [
        torch.cat([g.flatten() for g in torch.autograd.grad(part, places, retain_graph=True, materialize_grads=True)])
        .norm()
        .item()
        for part in (task, 0.7 * value)
    ]
    share = 1.0 if balance == "none" else min(1.0, lengths[0] / lengths[1])
    want = torch.autograd.grad(task - share * 0.7 * value, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_the_gradient_reaches_the_base_through_rows_and_through_shuffled_rows():
    data = mixed(missing=False)
    model = made(data=data, weight=1.0, balance="none")
    both = with_shuffled(data.batch(torch.arange(12)), [torch.arange(12).roll(k) for k in range(3)])
    z = model.base.features(both.inputs)
    z.retain_grad()
    model._measured(z[:12], z[12:]).backward()
    assert (z.grad[:12].norm(dim=1) > 0).all() and (z.grad[12:].norm(dim=1) > 0).all()


def test_each_phase_steps_its_own_parameters_alone():
    data = mixed(missing=False)
    model = made(data=data)
    main, critic = model.phases()
    own = {id(p) for p in model.base.parameters()}
    assert {id(p) for p in main.parameters} == own
    assert {id(p) for p in critic.parameters} == {id(p) for p in model.critic.parameters()}
    codes = critic.fixed(data.batch(torch.arange(12)))
    critic.loss(codes).total.backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None for p in model.critic.parameters())


def test_the_critic_reuses_the_codes_of_the_main_step_and_computes_others():
    data = mixed(missing=False)
    model = made(data=data).train()
    main, critic = model.phases()
    batch = data.batch(torch.arange(12))
    main.loss(batch)
    assert critic.fixed(batch) is model.codes[1]
    other = critic.fixed(data.batch(torch.arange(3, 15)))
    assert other is not model.codes[1] and other.joint.shape == model.codes[1].joint.shape
    assert not other.joint.requires_grad


def test_shuffled_rows_hold_no_true_pair_and_move_whole_modalities():
    data = mixed(missing=False)
    batch = data.batch(torch.arange(10))
    indices = made(data=data).permutations(10)
    for i, first in enumerate(indices):
        for second in indices[:i]:
            assert not (first == second).any()
    both = with_shuffled(batch, indices, "moved")
    for (name, x), index in zip(both.inputs.items(), indices, strict=True):
        own = batch.inputs[name]
        assert torch.equal(x.values[:10], own.values) and torch.equal(x.values[10:], own.values[index])
        if x.lengths is not None:
            assert torch.equal(x.lengths[10:], own.lengths[index])


def test_kept_lengths_cut_longer_sequences_and_start_shorter_ones_again():
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]).float()[..., None]
    batch = Batch({"x": Inputs(values, torch.tensor([4, 2]))}, None, None, torch.arange(2))
    found = with_shuffled(batch, [torch.tensor([1, 0])]).inputs["x"]
    assert found.values[2:, :, 0].tolist() == [[5, 6, 5, 6], [1, 2, 0, 0]]
    assert found.lengths.tolist() == [4, 2, 4, 2]


class Masks(Model):
    """A base model that sees only padding: its fused representation is the lengths of all modalities."""

    def representations(self, batch):
        return {"fused": torch.stack([x.lengths.float() for x in batch.inputs.values()], 1)}


def aligned(rows=400):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    parts = tuple(Modality(n, torch.randn(int(offsets[-1]), 2, generator=generator), offsets) for n in "ab")
    return Dataset("aligned", parts, None, Target.none(), torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("measure", ["kl", "f", "wasserstein"])
def test_a_critic_that_sees_only_the_padding_finds_nothing_unless_lengths_move(measure):
    from models.mdm import MDM, Settings

    data = aligned()
    batch = data.batch(torch.arange(400))
    values = {}
    for lengths in ("kept", "moved"):
        torch.manual_seed(0)
        settings = Settings(measure=measure, lengths=lengths, hidden=(32,), bound="none", negatives=1.0)
        model = MDM(Masks(), data, settings)
        optimizer = torch.optim.Adam(model.critic.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            model.critic_loss(model.fixed(batch)).total.backward()
            optimizer.step()
        with torch.no_grad():
            values[lengths] = model._measured(*model.fixed(batch)).item()
    assert values["kept"] <= 1e-6
    assert values["moved"] > 0.2


def test_controls_find_nothing_and_learn_nothing():
    data = mixed(missing=False)
    batch = data.batch(torch.arange(12))
    same = made(data=data, control="same", measure="wasserstein").eval()
    codes = same.fixed(batch)
    assert same._measured(*codes).item() == pytest.approx(0, abs=1e-6)
    assert [phase.name for phase in made(data=data, control="random").phases()] == ["main"]


def test_the_weight_rises_over_the_ramp_and_validation_sees_the_base_alone():
    data = mixed(missing=False)
    model = made(data=data, ramp=0.5, weight=2.0)
    assert [setattr(model, "progress", p) or model.weight() for p in (0, 0.25, 0.5, 1)] == [0, 1, 2, 2]
    batch = data.batch(torch.arange(12))
    model.eval()
    torch.testing.assert_close(model.phases()[0].loss(batch).total, model.base.phases()[0].loss(batch).total)


WIDTHS = {"mfn": 8, "late-fusion": 8, "lmf": 8, "mult": 4}


def even(rows=24):
    """Sequences that all have the same length, because aligned base models resample a row to its longest modality."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(rows + 1) * 4
    parts = (
        Modality("frames", torch.randn(4 * rows, 3, generator=generator), offsets),
        Modality("tokens", torch.randint(1, 7, (4 * rows,), generator=generator), offsets, vocabulary=7),
        Modality("other", torch.randn(4 * rows, 5, generator=generator), offsets),
    )
    split = torch.arange(rows) % 3
    return Dataset("even", parts, torch.arange(rows) % 2, Target.classes(2), split)


@pytest.mark.parametrize("base", BASES)
def test_a_part_of_the_triple_knows_its_own_modality_alone(base):
    data = even()
    model = made(base, data, input="triple").eval()
    batch = data.batch(torch.arange(12))
    if base in WIDTHS:
        assert model.widths == [WIDTHS[base]] * 3
    before = model.read(batch).split(model.widths, 1)
    for moved, name in enumerate(data.names):
        x = batch.inputs[name]
        other = batch._replace(inputs=batch.inputs | {name: x.take(torch.arange(12).roll(1))})
        after = model.read(other).split(model.widths, 1)
        for part, (a, b) in enumerate(zip(before, after, strict=True)):
            torch.testing.assert_close(b, a.roll(1, 0) if part == moved else a, rtol=1e-4, atol=1e-5)
            assert part != moved or not torch.allclose(a, b)


@pytest.mark.parametrize("base", BASES)
def test_a_triple_moves_what_its_parts_depend_on_no_further_than_the_task(base):
    data = mixed(missing=False)
    model = made(base, data, input="triple", weight=1e4).eval()
    model.training = True
    model.critic.mlp.layers[-1].weight.data.mul_(200)
    batch = data.batch(torch.arange(12))
    parameters = list(model.base.parameters())
    task = torch.autograd.grad(model.base.loss(batch).total, parameters, materialize_grads=True, allow_unused=True)
    total = torch.autograd.grad(model.phases()[0].loss(batch).total, parameters, materialize_grads=True)
    share = [(a - b).norm() for a, b in zip(total, task, strict=True)]
    assert 0 < torch.stack(share).norm() < 50 * torch.stack([g.norm() for g in task]).norm()


def test_a_base_of_any_kind_has_a_triple():
    data = mixed(missing=False)
    model = made("mird", data, input="triple").train()
    assert len(model.widths) == 3
    found = model.phases()[0].loss(data.batch(torch.arange(12)))
    assert found.total.isfinite() and "dependency" in found.terms


def test_the_text_of_a_shuffled_row_stays_and_the_others_move():
    data = mixed(missing=False)
    batch = data.batch(torch.arange(12))
    for names in (data.names, ("tokens", "vectors"), ("frames", "vectors")):
        chosen = data.choose(names)
        both = made("early-fusion", chosen, negatives=0.5)._shuffled(chosen.batch(torch.arange(12)))
        stays = "tokens" if "tokens" in names else names[0]
        for name, x in both.inputs.items():
            assert torch.equal(x.values[12:], batch.inputs[name].values[:6]) is (name == stays), name


def test_bases_without_a_fused_representation_and_the_penalty_itself_are_refused():
    with pytest.raises(ValueError, match="no representation 'fused'; set representation to one of encoder"):
        made("simclr", mixed(missing=False))
    assert made("simclr", mixed(missing=False), representation="encoder").critic.dim == 3 * 8
    with pytest.raises(ValueError, match="base must be a model without the penalty"):
        made("mdm", mixed(missing=False))


@pytest.mark.parametrize("negatives, rows, shuffled", [(0.5, 16, 8), (0.125, 48, 6), (0.125, 16, 4), (0.125, 3, 3)])
def test_fewer_negatives_are_that_many_rows_and_at_least_four_if_the_batch_has_them(negatives, rows, shuffled):
    data = mixed(missing=False)
    codes = made(data=data, negatives=negatives).eval().fixed(data.batch(torch.arange(rows)))
    assert len(codes.joint) == rows and len(codes.product) == shuffled


@pytest.mark.parametrize("measure", ["kl", "f", "wasserstein"])
def test_a_run_with_the_penalty_trains_is_saved_and_read_again(measure, tmp_path):
    data = mixed("regression")
    settings = config(measure=measure, weight=0.3, fresh=True, critic_steps=2)
    trained = fit(settings, data, tmp_path, progress=False).model.eval()
    found = load_run(tmp_path, data)[1]
    batch = data.batch(data.rows("test"))
    assert torch.equal(found.predict(batch), trained.predict(batch)) and found.predict(batch).isfinite().all()


def test_bad_settings_are_named():
    for bad, message in [
        ({"measure": "js"}, "measure must be one of"),
        ({"negatives": 0.0}, "negatives must lie between 0 and 1"),
        ({"weight": -1.0}, "weight must not be negative"),
        ({"base": "nothing"}, "base must be one of"),
        ({"base": {"name": "mfn", "hiden": 3}}, "model.base.hiden; did you mean model.base.hidden"),
        ({"base": 3}, "model.base must be a model's name"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_dict({"model": {"name": "mdm", **bad}})
    with pytest.raises(ValueError, match="two modalities"):
        made("early-fusion", mixed(missing=False).choose(("frames",)))


def test_nested_settings_go_through_yaml_and_are_changed_by_dotted_names():
    settings = config("mfn")
    assert from_dict(settings.to_dict()) == settings
    assert settings.changed({"model.base.memory": 5}).model.base.settings.memory == 5
    assert settings.changed({"model.base": "lmf"}).model.base.name == "lmf"
    named = settings.changed({"model.base": "lmf", "model.base.rank": 2})
    assert named.model.base.settings.rank == 2
    other = named.changed({"model.base.name": "mult", "model.base.sizes.dim": 10})
    assert other.model.base.name == "mult" and other.model.base.settings.sizes.dim == 10
    assert named.changed({"model.base": {"memory": 5, "name": "mfn"}}).model.base.settings.memory == 5
    with pytest.raises(ValueError, match=r"model\.base\.memory"):
        named.changed({"model.base.memory": 5})
    with pytest.raises(ValueError, match=r"no setting model\.measure\.x: model\.measure holds no others"):
        settings.changed({"model.measure.x": 5})
    assert settings.flat()["model.base.name"] == "mfn"


def test_three_gaussians_have_their_total_correlation():
    """For rho = 0.5 and d = 4 the total correlation is 1.386 nats and W_1 lies in [1.119, 1.172]; a trained critic
    finds 1.2 to 1.4 nats and 1.05 to 1.25."""
    from models.mdm import MDM, Settings

    rho, d = 0.5, 4
    assert -d / 2 * math.log((1 - rho) ** 2 * (1 + 2 * rho)) == pytest.approx(1.3863, abs=1e-4)
    mixing = torch.linalg.cholesky(torch.full((3, 3), rho).fill_diagonal_(1))
    generator = torch.Generator().manual_seed(0)

    def sample(n):
        return torch.einsum("ij,njd->nid", mixing, torch.randn(n, 3, d, generator=generator))

    class Side(Model):
        def representations(self, batch):
            return {"fused": torch.cat([x.values for x in batch.inputs.values()], 1)}

        def phases(self):
            return [Phase("main", [], self.predict)]

    def rows(n):
        inputs = {m: Inputs(x) for m, x in zip("avl", sample(n).unbind(1), strict=True)}
        return Batch(inputs, None, None, torch.arange(n))

    parts = tuple(Modality(m, torch.randn(4, d)) for m in "avl")
    data = Dataset("three", parts, None, Target.none(), torch.zeros(4, dtype=torch.int64))
    for measure, low, high in (("kl", 1.2, 1.4), ("f", 1.2, 1.4), ("wasserstein", 1.05, 1.25)):
        torch.manual_seed(0)
        model = MDM(Side(), data, Settings(measure=measure, hidden=(96, 96), bound="none", negatives=1.0))
        optimizer = torch.optim.Adam(model.critic.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=350, pct_start=0.1)
        for _ in range(350):
            optimizer.zero_grad()
            model.critic_loss(model.fixed(rows(256))).total.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            assert low < model._measured(*model.fixed(rows(20000))).item() < high, measure
