"""MFM: what each factor affects, distances to the prior, surrogates, ablations, interpretation, synthetic factors."""

import itertools

import pytest
import torch
from torch import nn

import mi_kernels as mk
from bench import mfm as step_by_step
from models.batch import Inputs, Target
from models.data import Dataset, Modality
from models.data.corruption import CorruptionConfig
from models.evaluation.scores import damaged, evaluate
from models.layers.decoders import sequence_errors
from models.mfm import analyses
from models.mfm.config import VARIANTS, Settings
from models.mfm.interpretation import gradient_curves, information_ratios, swapped
from models.mfm.model import MFMNet, prior_distance
from models.registry import build
from models.training.fit import fit
from tests.models.helpers import config, mixed

NAMES, DIMS = ("l", "a", "v"), (5, 3, 4)


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


def net(**settings):
    sizes = {"code": 4, "joint_code": 5, "factor": 16, "joint_factor": 24, "hidden": 4, "memory": 4, "networks": 6}
    torch.manual_seed(0)
    return MFMNet(NAMES, DIMS, Settings(**sizes | settings), 2).double().eval()


def sequences(rows=3, steps=4):
    return [Inputs(torch.randn(rows, steps, d, dtype=torch.float64, requires_grad=True)) for d in DIMS]


def reached(out, source):
    (gradient,) = torch.autograd.grad(out.sum(), source, retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def test_private_factors_reach_their_own_modality_alone():
    model, x = net(), sequences()
    codes = {n: z.detach().requires_grad_() for n, z in model.codes(x).items()}
    factors = model.factors(codes)
    outputs, decoded = model.head(model.read(factors)), model.decode(factors, 4)
    for first, second in itertools.product(NAMES, NAMES):
        assert reached(decoded[first], factors[second]) == (first == second)
        assert not reached(outputs, codes[second])
        assert reached(decoded[first], factors["y"])
    assert reached(outputs, codes["y"])


@pytest.mark.parametrize("changes", [{}, {"code": (6, 6, 4), "hidden": 5}])
def test_a_step_equals_the_step_by_step_formulation(changes):
    small = {"code": (6, 4, 8), "joint_code": 6, "factor": (9, 4, 4), "joint_factor": 5, "hidden": (7, 6, 5)}
    found = step_by_step.gaps(*step_by_step.problem(5, Settings(**small | {"networks": 8} | changes), steps=6))
    assert max(found.values()) < 1e-5, found


def test_modalities_have_widths_of_their_own():
    model = net(code=(2, 3, 4), factor=(5, 6, 7), hidden=(8, 9, 10), surrogate=True)
    codes = model.codes(sequences())
    assert {n: z.shape[1] for n, z in codes.items()} == {"y": 5, "l": 2, "a": 3, "v": 4}
    assert {n: f.shape[1] for n, f in model.factors(codes).items()} == {"y": 24, "l": 5, "a": 6, "v": 7}
    assert [model.surrogates(sequences(), n)[0].shape[1] for n in NAMES] == [2, 3, 4]
    assert model.encoders["y"].fusion.config.hidden == (8, 9, 10)
    assert {n: tuple(x.shape) for n, x in model.decode(model.factors(codes), 4).items()} == {
        n: (3, 4, d) for n, d in zip(NAMES, DIMS, strict=True)
    }


def test_surrogate_codes_do_not_depend_on_what_is_missing():
    model, x = net(surrogate=True), sequences()
    for place, name in enumerate(NAMES):
        for code in model.surrogates(x, name):
            assert [reached(code, t.values) for t in x] == [m != place for m in range(3)]


def test_the_prior_distance_is_the_published_sum_of_kernels():
    codes = {n: torch.randn(7, d, dtype=torch.float64) for n, d in (("y", 4), ("l", 4), ("a", 3))}
    torch.manual_seed(3)
    found = prior_distance(codes, nn.ModuleDict(), sampled=True)
    torch.manual_seed(3)
    draws = [*torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(1, 7, 3, dtype=torch.float64)[0]]

    def kernel(a, b):
        return (-((a[:, None] - b).square().mean(2)) / a.shape[1]).exp().mean()

    pairs = list(zip(codes.values(), draws, strict=True))
    wanted = sum(kernel(g, g) + kernel(z, z) - 2 * kernel(g, z) for z, g in pairs)
    torch.testing.assert_close(found, wanted)
    assert mk.gaussian_mmd(draws[2], prior_samples=draws[2]) == 0


def test_the_kl_distance_is_that_of_normals():
    spreads = nn.ModuleDict({"y": nn.Linear(3, 3)})
    z = torch.randn(6, 3)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(z, (0.5 * spreads["y"](z)).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(prior_distance({"y": z}, spreads, sampled=True), wanted.sum(1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["classes", "regression"])
def test_every_ablation_trains_all_its_weights(variant, target):
    data = mixed(target, missing=False)
    settings = config("mfm", {"model.variant": variant, "model.surrogate": variant == "full"})
    model = build(settings.name, settings.model, data, 0)
    model.loss(data.batch(torch.arange(12))).total.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    parts = VARIANTS[variant]
    assert ("F_y" in model.representations(data.batch(torch.arange(3)))) == parts.joint
    assert len(model.net.decoders) == (3 if parts.generative else 0)


@pytest.mark.parametrize("slip", [False, True])
def test_the_missing_modality_is_rebuilt_from_the_codes_without_it_and_the_slip_has_a_switch(slip):
    data = mixed(missing=False)
    changes = {"model.surrogate": True, "model.public_slip": slip, "model.dropout": 0.0}
    settings = config("mfm", changes)
    model = build(settings.name, settings.model, data, 0).eval()
    batch = data.batch(torch.arange(9))
    x = model.inlet(batch.inputs)
    codes = model.net.codes(x)
    last, before = model.net.names[-1], model.net.names[-2]

    def error(missing, rebuilt):
        code, joint = model.net.surrogates(x, missing)
        factors = model.net.factors(codes | {missing: code, "y": joint})
        found = model.net.decode(factors, x[0].values.shape[1])[rebuilt]
        return sequence_errors(found, x[model.net.names.index(rebuilt)])

    wanted = sum(error(n, n) for n in model.net.names[:-1]) + error(before if slip else last, last)
    torch.testing.assert_close(model.loss(batch).terms["reconstruction_missing"], wanted.detach())


def test_the_generative_baseline_never_reads_what_it_rebuilds():
    model, x = net(variant="seq2seq"), sequences()
    decoded = model.decode(model.factors(model.codes(x)), 4)
    for name in NAMES:
        assert [reached(decoded[name], t.values) for t in x] == [name != other for other in NAMES]
    assert not model.read(model.factors(model.codes(x))).requires_grad
    with pytest.raises(ValueError, match="needs two modalities or more"):
        MFMNet(("l",), (5,), Settings(variant="seq2seq"), 2)


@pytest.mark.parametrize("changes", [{"surrogate": True}, {}, {"variant": "seq2seq"}], ids=["surrogate", "zero", "seq"])
def test_a_rebuilt_modality_does_not_depend_on_itself(changes):
    data = mixed(missing=False)
    model = build("mfm", config("mfm", {f"model.{n}": v for n, v in changes.items()}).model, data, 0).eval()
    batch = data.batch(torch.arange(9))
    other = batch.inputs["frames"]
    changed = dict(batch.inputs) | {"frames": other._replace(values=other.values + 1)}
    found, wanted = model.rebuilt(batch.inputs, "frames")
    torch.testing.assert_close(model.rebuilt(changed, "frames")[0], found)
    assert found.shape == wanted.values.shape
    assert not torch.allclose(model.rebuilt(changed, "vectors")[0], model.rebuilt(batch.inputs, "vectors")[0])


def test_gradient_curves_are_the_jacobians_norms():
    model = net()
    factors = {n: f.detach() for n, f in model.factors(model.codes(sequences())).items()}
    found = gradient_curves(model, factors, 4)
    for name in NAMES:
        row = {n: f[1:2] for n, f in factors.items()}
        whole = torch.autograd.functional.jacobian(
            lambda f, row=row, name=name: model.decode(row | {"y": f}, 4)[name][0], row["y"]
        )
        torch.testing.assert_close(found[name][1], whole.square().sum((1, 2, 3)))


def test_settings_that_do_not_fit_are_refused():
    for wrong, message in (
        ({"variant": "M_F"}, "variant must be one of full"),
        ({"surrogate": True, "variant": "M_B"}, "surrogate needs variant full"),
        ({"surrogate_phase": True}, "surrogate_phase needs surrogate true"),
        ({"prior_weight": -1.0}, "prior_weight must be finite and not negative"),
        ({"reconstruction": float("inf")}, "reconstruction must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)
    with pytest.raises(ValueError, match="code must be at least 1, got 0"):
        Settings(code=(3, 0))
    with pytest.raises(ValueError, match=r"hidden must be one width or one for each of 3 modalities, got \[4, 5\]"):
        net(hidden=(4, 5))
    with pytest.raises(ValueError, match="variant must be full"):
        information_ratios(net(variant="M_D"), {}, 4)


def known_factors(rows=400, steps=4):
    """Two modalities. Both depend on the label in their first column; the other three have each modality's own
    style."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    y = torch.randint(2, (rows,), generator=generator)
    modalities, styles = [], []
    for name in ("one", "two"):
        style = torch.randint(2, (rows,), generator=generator)
        clean = torch.stack([2.0 * y - 1, *[2.0 * style - 1] * 3], 1)
        values = clean[:, None].expand(-1, steps, -1) + 0.4 * draw(rows, steps, 4)
        offsets = torch.arange(0, rows * steps + 1, steps)
        modalities.append(Modality(name, values.reshape(-1, 4), offsets))
        styles.append(style)
    split = torch.tensor([0, 0, 0, 1, 2]).repeat(rows // 5)
    return Dataset("factors", tuple(modalities), y, Target.classes(2), split).standardised(), styles


def trained(data, steps=200, **settings):
    """A trained MFM with one number per code, so that a private code has no room for what F_y already has, and vice
    versa."""
    sizes = {"code": 1, "joint_code": 1, "factor": 8, "joint_factor": 8, "encoder": "lstm", "dropout": 0.0}
    base = {"reconstruction": 1.0, "prior": "analytic", "prior_weight": 0.1}
    return analyses.trained(data, Settings(**sizes | base | settings), steps, rate=1e-2)


def test_the_shared_factor_predicts_the_label():
    data, _ = known_factors()
    model = trained(data)
    found = evaluate(model, data, only=("head", "F_y"))
    assert found.scores["head"]["test"]["accuracy"] > 0.95 and found.scores["F_y"]["test"]["accuracy"] > 0.95
    factors = model.net.factors(model.codes(data.batch(data.rows("test")[:20]).inputs))
    assert swapped(model.net, factors, "one", 4).shape == (20, 20, 4, 4)
    assert all(ratio > 0 for ratio in information_ratios(model.net, factors, 4).values())


def test_surrogates_with_steps_of_their_own_leave_the_model_as_it_would_be_without_them(tmp_path):
    """The other weights are bitwise those of a run without surrogates, and the surrogates' weights have changed."""
    data = mixed(missing=False)
    networks = {"model.dropout": 0.0, "model.network_dropout": 0.0, "model.prior": "analytic"}
    own = {"model.surrogate": True, "model.surrogate_phase": True}
    found = {}
    for name, changes in (("without", {}), ("with", own)):
        settings = config("mfm", networks | changes, epochs=1)
        found[name] = fit(settings, data, tmp_path / name, progress=False).model.state_dict()
    fresh = build("mfm", config("mfm", networks | own).model, data, 0).state_dict()
    surrogates = {name for name in found["with"] if "surrogate" in name}
    assert set(found["with"]) - surrogates == set(found["without"])
    assert all(torch.equal(found["with"][name], value) for name, value in found["without"].items())
    assert surrogates and not any(torch.equal(found["with"][name], fresh[name]) for name in surrogates)


@pytest.mark.parametrize("own_steps", [False, True])
def test_surrogates_predict_with_either_modality_missing(own_steps):
    data, _ = known_factors()
    model = trained(data, 100, surrogate=True, surrogate_phase=own_steps, code=6, joint_code=6)
    found = evaluate(model, data, only=("head",))
    for name in data.names:
        assert damaged(model, data, found, CorruptionConfig(drop={name: 1.0}))["head"]["accuracy"] > 0.95


def pictures_and_sounds(rows=60):
    """Pictures of 5 x 7 and ragged sequences that depend on one of two classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (rows,), generator=generator)
    pictures = 0.8 * y[:, None] * torch.ones(rows, 35) + 0.1 * torch.rand(rows, 35, generator=generator)
    lengths = torch.randint(1, 9, (rows,), generator=generator)
    sounds = torch.randn(int(lengths.sum()), 3, generator=generator) + 2 * y.repeat_interleave(lengths)[:, None]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    modalities = (Modality("image", pictures, shape=(5, 7)), Modality("audio", sounds, ends))
    return Dataset("pairs", modalities, y, Target.classes(2), torch.tensor([0, 0, 0, 1, 2]).repeat(rows // 5))


def test_pictures_are_read_and_drawn_by_convolutions_beside_sequences_of_their_own_length():
    data = pictures_and_sounds()
    model = trained(data, 60, encoder="separate", pictures="convolution", surrogate=True, code=4, joint_code=4)
    batch = data.batch(data.rows("test"))
    x = model.inlet(batch.inputs)
    steps = {"image": 1, "audio": x[1].values.shape[1]}
    found = model.net.decode(model.net.factors(model.codes(batch.inputs)), steps)
    assert found["image"].shape == (12, 1, 35) and found["audio"].shape == (12, steps["audio"], 3)
    assert ((found["image"] > 0) & (found["image"] < 1)).all()
    assert (found["image"][:, 0] - batch.inputs["image"].values).square().mean() < 0.05
    scores = evaluate(model, data, only=("head",))
    assert scores.scores["head"]["test"]["accuracy"] > 0.9
    for name in data.names:
        assert damaged(model, data, scores, CorruptionConfig(drop={name: 1.0}))["head"]["accuracy"] > 0.9


@pytest.mark.parametrize("variant", [name for name in VARIANTS])
def test_every_ablation_has_a_convolutional_form(variant):
    data = pictures_and_sounds(20)
    settings = Settings(variant=variant, encoder="separate", pictures="convolution", code=3, joint_code=3, hidden=4)
    model = build("mfm", settings, data, 0)
    model.loss(data.batch(torch.arange(20))).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="need encoder separate"):
        Settings(pictures="convolution")
