"""Models with a prediction head: any modalities, classes and regression, missing modalities in training and testing,
padding that is never read."""

import dataclasses

import pytest
import torch

from models.batch import Batch, Inputs, Target
from models.data import Dataset, Modality
from models.data.corruption import CorruptionConfig
from models.evaluation.scores import conditions, damaged, evaluate, references
from models.layers.inlet import Inlet, aligned, resampled
from models.registry import build
from models.training.fit import fit
from tests.models.helpers import config, mixed

HEADS = ("early-fusion", "late-fusion", "ef-lstm", "lmf", "mfn", "mult")
LONG = {"epochs": 8, "lr": 2e-2, "batch_size": 18, "select": "best"}


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


def made(model, data):
    settings = config(model)
    return build(settings.name, settings.model, data, 0)


# Every model on classes, and three kinds of network on regression.
CASES = [
    *((model, "classes") for model in HEADS),
    *((model, "regression") for model in ("early-fusion", "mfn", "mult")),
]


@pytest.mark.parametrize(("model", "target"), CASES)
def test_every_model_learns_from_three_modalities_with_some_missing(model, target, tmp_path):
    data = mixed(target)
    found = evaluate(fit(config(model, **LONG), data, tmp_path, progress=False).model, data, only=("head",))
    guess = references(data)["constant"]["-"]["test"]
    scores = found.scores["head"]["test"]
    if target == "classes":
        assert scores["accuracy"] > guess["accuracy"] + 0.2
    else:
        assert scores["mae"] < 0.75 * guess["mae"] and scores["pearson"] > 0.6


@pytest.mark.parametrize("model", HEADS)
def test_a_row_is_predicted_alone_as_in_its_batch_and_with_any_padding(model):
    data = mixed()
    net = made(model, data).eval().double()
    batch = data.batch(torch.arange(20)).to(torch.float64)
    together = net.predict(batch)
    for row in (0, 3, 5, 7):
        alone = net.predict(data.batch(torch.tensor([row])).to(torch.float64))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-12)
    x = batch.inputs["frames"]
    within = torch.arange(x.values.shape[1]) < x.lengths[:, None]
    noise = x._replace(values=x.values.masked_fill(~within[..., None], 7.0))
    torch.testing.assert_close(net.predict(batch._replace(inputs=batch.inputs | {"frames": noise})), together)


@pytest.mark.parametrize("model", HEADS)
def test_unlabelled_rows_take_no_part_in_the_loss(model):
    data = mixed()
    labelled = torch.arange(len(data)) % 2 == 0
    some = dataclasses.replace(data, labelled=labelled)
    phase = made(model, some).eval().phases()[0]
    rows = torch.arange(12)
    loss = phase.loss(phase.usable(some.batch(rows))).total
    torch.testing.assert_close(loss, phase.loss(data.batch(rows[::2])).total)


def test_damage_in_training_and_testing_reaches_any_model(tmp_path):
    data = mixed(missing=False)
    damage = {"training.corruption.drop": {"*": 0.3}, "training.corruption.noise": {"frames": 0.2}}
    model = fit(config("late-fusion", damage, **LONG), data, tmp_path, progress=False).model
    found = evaluate(model, data, only=("head",))
    clean = found.scores["head"]["test"]["accuracy"]
    values = {name: damaged(model, data, found, c)["head"]["accuracy"] for name, c in conditions(data).items()}
    assert set(values) == {"missing frames", "missing tokens", "missing vectors", "noise 0.5", "noise 1", "noise 2"}
    assert all(value <= clean + 0.1 for value in values.values()) and values["missing vectors"] > 0.6
    everything = damaged(model, data, found, CorruptionConfig(drop={"*": 1.0}))["head"]["accuracy"]
    counts = data.labels[data.rows("test")].bincount() / len(data.rows("test"))
    assert everything == pytest.approx(counts[0].item()) or everything == pytest.approx(counts[1].item())


def test_several_targets_are_predicted_in_their_own_units(tmp_path):
    x = torch.randn(120, 4)
    y = torch.stack([1000 + 5 * x[:, 0], 1e-3 * x[:, 1]], 1)
    data = Dataset("two", (Modality("x", x),), y, Target.regression(2), torch.arange(120) % 3)
    settings = config("early-fusion", {"model.dropout": 0.0}, epochs=25, lr=2e-2, batch_size=20)
    model = fit(settings, data, tmp_path, progress=False).model.eval()
    found = model.predict(data.batch(data.rows("test")))
    error = (found - y[data.rows("test")]).abs().mean(0)
    assert error[0] < 2 and error[1] < 4e-4


def test_resampling_takes_means_of_equal_parts_and_leaves_aligned_rows_alone():
    values = torch.arange(12.0).reshape(2, 6, 1)
    found = resampled(values, torch.tensor([6, 2]), torch.tensor([3, 3]))
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.5, 2.5, 4.5]))
    torch.testing.assert_close(found[1, :, 0], torch.tensor([6.0, 6.0, 7.0]))
    x = Inputs(values, torch.tensor([6, 2]))
    gone = Inputs(torch.zeros(2, 1, 1), torch.tensor([0, 1]))
    first, second = aligned([x, gone], 8)
    assert torch.equal(first.values[0], x.values[0]) and torch.equal(first.values[1, :2], x.values[1, :2])
    assert first.lengths.tolist() == second.lengths.tolist() == [6, 2]
    assert (second.values == 0).all()


def test_an_inlet_makes_sequences_of_everything():
    data = mixed()
    inlet = Inlet(data.modalities, embedding=6)
    frames, tokens, vectors = inlet(data.batch(torch.arange(10)).inputs)
    assert inlet.dims == (3, 6, 5) and tokens.values.shape[2] == 6 and vectors.values.shape == (10, 1, 5)
    assert (vectors.lengths == data["vectors"].has()[:10].long()).all() and frames.lengths[0] == 0


def test_data_that_a_model_cannot_take_is_refused():
    data = mixed()
    unlabelled = dataclasses.replace(data, labels=None, target=Target.none())
    with pytest.raises(ValueError, match="needs labels, the data has none"):
        made("mult", unlabelled)
    with pytest.raises(ValueError, match="mult needs two modalities"):
        made("mult", data.choose(("frames",)))
    with pytest.raises(ValueError, match="supcon needs class labels"):
        made("supcon", mixed("regression"))


def test_contrastive_models_take_three_modalities():
    data = mixed(missing=False)
    batch = data.batch(torch.arange(20))
    for name in ("simclr", "supcon"):
        loss = made(name, data).phases()[0].loss(batch)
        assert loss.total.isfinite()
    assert isinstance(batch, Batch)
