"""For every model, runs that would learn nothing are refused before they start or end with an error of one sentence."""

import dataclasses
import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from models.data import generate
from models.model import Loss, Model, Phase
from models.registry import MODELS
from models.training.config import TrainingConfig
from models.training.fit import fit
from models.training.history import history
from models.training.phases import NotFinite, Training
from tests.models.helpers import NEED_TEXT, config, mixed


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


@pytest.fixture(scope="module")
def data():
    return generate(100, seed=0).standardised()


class Watch(Callback):
    """Keeps the trainer's optimisers, for tests to inspect."""

    def on_train_end(self, trainer, module):
        self.optimizers = trainer.optimizers


def test_a_batch_of_one_row_is_refused_by_the_settings():
    with pytest.raises(ValueError, match=r"batch_size must be at least 2, since losses compare rows; got 1"):
        TrainingConfig(batch_size=1)


@pytest.mark.parametrize("model", MODELS)
def test_a_modality_that_no_row_keeps_is_refused_or_every_phase_steps(model, data, tmp_path):
    if model in NEED_TEXT:
        pytest.importorskip("transformers")
        data = mixed(missing=False)
    name, watch = data.names[0], Watch()
    settings = config(model, {"training.corruption.drop": {name: 1.0}}, epochs=1)
    try:
        fit(settings, data, tmp_path / "run", progress=False, callbacks=[watch])
    except ValueError as error:
        assert re.search(r"no batch has 2 rows that phase '\w+' can use; lower training\.corruption\.drop", str(error))
        assert name in str(error) and not (tmp_path / "run").exists()
    else:
        assert watch.optimizers and all(optimizer.state for optimizer in watch.optimizers)


@pytest.mark.parametrize("value, kind", [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_values_that_are_not_finite_are_named_before_training(value, kind, tmp_path):
    data = mixed()
    frames, tokens, vectors = data.modalities
    values = frames.values.clone()
    values[frames.offsets[4]], values[frames.offsets[7]] = value, value
    broken = dataclasses.replace(data, modalities=(dataclasses.replace(frames, values=values), tokens, vectors))
    with pytest.raises(ValueError, match=f"'frames' holds {kind} values, the first in row 4, in 2 rows altogether"):
        fit(config("mfn"), broken, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    values = vectors.values.clone()
    values[~vectors.present] = value  # in rows without the modality, whose values are never read
    absent = dataclasses.replace(data, modalities=(frames, tokens, dataclasses.replace(vectors, values=values)))
    fit(config("mfn", epochs=1), absent, tmp_path / "run", progress=False)


@pytest.mark.parametrize("model", ["mird", "misa", "mmim", "simclr", "factorcl-sup", "mfm"])
def test_models_of_complete_rows_refuse_a_modality_that_is_always_dropped(model, data, tmp_path):
    settings = config(model, {"training.corruption.drop": {data.names[0]: 1.0}})
    with pytest.raises(ValueError, match=r"lower training\.corruption\.drop"):
        fit(settings, data, tmp_path, progress=False)


def test_data_whose_rows_a_phase_cannot_use_is_counted_in_the_refusal(data, tmp_path):
    nowhere = dataclasses.replace(data["x1"], present=torch.arange(len(data)) >= len(data) - 1)
    absent = dataclasses.replace(data, modalities=(nowhere, data["x2"]))
    with pytest.raises(ValueError, match=r"0 have every modality and \d+ a label: set data.modalities"):
        fit(config("simclr"), absent, tmp_path, progress=False)
    unlabelled = dataclasses.replace(data, labelled=torch.arange(len(data)) == int(data.rows("train")[0]))
    with pytest.raises(ValueError, match=r"have every modality and 1 a label: set data.labels"):
        fit(config("early-fusion"), unlabelled, tmp_path, progress=False)


def test_a_validation_loss_that_decides_something_must_exist(data, tmp_path):
    present = data.split != 1
    absent = dataclasses.replace(data, modalities=(dataclasses.replace(data["x1"], present=present), data["x2"]))
    for changes, said in (({"select": "best"}, "select=best"), ({"patience": 2}, "patience=2")):
        with pytest.raises(ValueError, match=rf"training.{said} needs a validation loss, but no validation batch"):
            fit(config("simclr", **changes), absent, tmp_path / "run", progress=False)
    fit(config("simclr", epochs=1), absent, tmp_path / "run", progress=False)


def test_a_best_epoch_that_never_was_finite_is_an_error(data, tmp_path, monkeypatch):
    def never(module, batch, index):
        module.log("valid_loss", torch.tensor(float("nan")), batch_size=batch.size)

    monkeypatch.setattr(Training, "validation_step", never)
    with pytest.raises(ValueError, match=r"training\.select=best found no validation loss that is finite"):
        fit(config("simclr", select="best"), data, tmp_path, progress=False)


def test_a_run_shorter_than_its_pause_between_looks_is_validated_at_its_end(data, tmp_path):
    fit(config("simclr", epochs=2, validate=5, select="best"), data, tmp_path, progress=False)
    assert [epoch for epoch, _ in history(tmp_path, "valid_loss")] == [1]


class Silent(Model):
    """A model with two phases: the first learns; a test chooses the second one's loss and usable rows."""

    def __init__(self, loss, usable=lambda batch: batch):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        self.silent, self.usable = loss, usable

    def phases(self):
        return [
            Phase("main", [self.first], lambda batch: Loss.of({"loss": self.first.square().sum()})),
            Phase("critic", [self.second], lambda batch: Loss.of({"loss": self.silent(self)}), usable=self.usable),
        ]


@pytest.fixture
def trained(monkeypatch, data, tmp_path):
    def run(model, **changes):
        monkeypatch.setattr("models.training.fit.build", lambda *arguments: model)
        return fit(config("simclr", **changes), data, tmp_path, progress=False)

    return run


def test_a_phase_that_never_steps_is_named_at_the_end(trained):
    counts = []

    def seldom(batch):  # two usable rows in the first batch, which is checked before training; afterwards none
        counts.append(0)
        return batch.take(torch.arange(2 if len(counts) == 1 else 0))

    with pytest.raises(ValueError, match=r"phase 'critic' took no step in 2 epochs, the model is untrained"):
        trained(Silent(lambda model: model.second.square().sum(), seldom))


def test_a_loss_of_a_later_phase_that_is_not_finite_stops_the_run(trained):
    with pytest.raises(NotFinite, match=r"the loss of phase 'critic' became nan in epoch 0: lower training.lr"):
        trained(Silent(lambda model: (model.second * float("nan")).sum()))
