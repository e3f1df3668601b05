"""Comparisons: searches see validation rows alone, every model gets the same trials, results can be read back."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from models import compare as comparing
from models.__main__ import main
from models.compare import SEARCH_SEED, compare, references, search
from models.data import Modality, PairedData, generate
from models.defaults import SEQUENCES, VECTORS, defaults, trials
from models.evaluation import headline, input_features, validation_accuracy
from models.runs import RunConfig, build

TINY = RunConfig(
    data="synthetic", epochs=1, batch_size=16, lr=1e-3, hidden=12, feature_dim=8, encoder_layers=0, critic_hidden=12
)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(comparing, "load_data", lambda config: generate(100, seed=config.seed))
    monkeypatch.setattr("models.experiment.load_data", lambda config: generate(100, seed=config.seed))


def flipped(data):
    """The same rows with every test label changed."""
    y = data.y.clone()
    y[data.rows("test")] = 1 - y[data.rows("test")]
    return dataclasses.replace(data, y=y)


@pytest.mark.parametrize("space, data", [(VECTORS, "synthetic"), (SEQUENCES, "utd-mhad"), (VECTORS, "mine.npz")])
def test_trials_start_with_the_defaults_and_cover_every_value(space, data):
    drawn = trials(data, 9)
    assert len(drawn) == 9 and drawn[0] == {} and drawn == trials(data, 9)
    for name, values in space.items():
        assert {trial[name] for trial in drawn[1:]} == set(values)
    for trial in drawn:
        dataclasses.replace(defaults(data), **trial)
    with pytest.raises(ValueError, match="number of trials"):
        trials(data, 0)


def test_validation_accuracy_does_not_depend_on_test_rows():
    data = generate(100)
    model = build(TINY, data)
    changed = flipped(data)
    changed.first.values[data.rows("test")] = 100.0
    assert validation_accuracy(model, changed) == validation_accuracy(model, generate(100))


def test_a_search_takes_the_first_setting_of_the_highest_validation_accuracy(monkeypatch, tmp_path):
    scores = iter([0.2, 0.7, 0.5, 0.7])
    monkeypatch.setattr(
        comparing, "trial", lambda config, folder, progress: seen.append(config) or {"valid": next(scores)}
    )
    seen = []
    for index in range(4):
        (tmp_path / f"trial{index}").mkdir()
    best, tried = search(TINY, 4, tmp_path)
    assert [entry["valid"] for entry in tried] == [0.2, 0.7, 0.5, 0.7]
    assert best == dataclasses.replace(TINY, **trials("synthetic", 4)[1])
    assert {config.seed for config in seen} == {SEARCH_SEED}


def test_a_trial_that_diverges_is_kept_as_a_failure(tmp_path):
    found = comparing.trial(dataclasses.replace(TINY, lr=1e30), tmp_path, progress=False)
    assert found["valid"] == 0.0 and "the loss became" in found["failed"]


def test_a_comparison_reports_choices_searches_and_references(tmp_path):
    found = compare(TINY, ("factorcl-sup", "simclr"), range(2), tmp_path / "out", number=2, progress=False)
    assert json.loads(json.dumps(found)) == found
    assert [len(found["search"]["models"][model]) for model in ("factorcl-sup", "simclr")] == [2, 2]
    for model, entries in found["search"]["models"].items():
        best = max(entries, key=lambda entry: entry["valid"])
        assert found["chosen"][model].items() <= best["settings"].items()
        assert all("test" not in entry for entry in entries)
    assert found["representation"] == {"untrained": "encoder", "factorcl-sup": "full", "simclr": "encoder"}
    assert {(run["model"], run["seed"]) for run in found["runs"]} == {
        (model, seed) for model in ("linear", "untrained", "factorcl-sup", "simclr") for seed in (0, 1)
    }
    rows = {(row["model"], row["representation"]): row for row in found["summary"]}
    values = [run["probe"]["full"]["test"] for run in found["runs"] if run["model"] == "factorcl-sup"]
    assert rows["factorcl-sup", "full"]["mean"] == pytest.approx(np.mean(values))


def test_runs_are_kept_for_the_same_settings_at_the_same_clean_commit_only(monkeypatch, tmp_path):
    calls = []

    def run(config, folder):
        config.save(folder)
        calls.append(config.lr)
        return {"call": len(calls)}

    def kept(config=TINY):
        return comparing._kept(tmp_path, "run.json", config, run)["call"]

    monkeypatch.setattr(comparing, "commit", lambda: "abc")
    assert [kept(), kept()] == [1, 1]
    assert kept(dataclasses.replace(TINY, lr=0.5)) == 2
    monkeypatch.setattr(comparing, "commit", lambda: "abd")
    assert kept(dataclasses.replace(TINY, lr=0.5)) == 3
    monkeypatch.setattr(comparing, "commit", lambda: "abd+changes")
    assert [kept(dataclasses.replace(TINY, lr=0.5)) for _ in range(2)] == [4, 5]


def test_references_are_a_linear_model_of_the_input_and_untrained_encoders():
    linear, untrained = references(TINY, generate(100))
    assert set(linear["probe"]) == {"x1", "x2", "input"} and set(untrained["probe"]) == {"encoder"}


def test_input_features_pool_sequences_and_pass_vectors():
    frames = torch.arange(12.0)[:, None]
    offsets = torch.tensor([0, 4, 12])
    data = PairedData(
        "d",
        Modality("a", frames, offsets),
        Modality("b", torch.eye(2)),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
        2,
    )
    parts = input_features(data, segments=2)
    np.testing.assert_allclose(parts["x1"][:, [0, 2]], [[0.5, 2.5], [5.5, 9.5]])
    np.testing.assert_array_equal(parts["x2"], np.eye(2))
    assert parts["input"].shape == (2, 6)


def test_the_headline_is_the_heads_of_factorcl_and_the_encoders_of_a_baseline():
    assert headline(["encoder", "full", "S"]) == "full" and headline(["encoder"]) == "encoder"


def test_the_command_compares_and_writes_its_results(tmp_path, capsys, monkeypatch):
    reported = []
    monkeypatch.setattr("models.__main__.write_report", reported.append)  # the demo's test writes a page
    sizes = ["--epochs", "1", "--batch-size", "16", "--hidden", "8", "--feature-dim", "8", "--critic-hidden", "8"]
    where = ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "results" / "found.json"), "--quiet"]
    command = ["compare", "--data", "synthetic", "--models", "simclr,factorcl-sup", "--seeds", "1", "--trials", "1"]
    assert main([*command, *sizes, *where]) == 0
    found = json.loads((tmp_path / "results" / "found.json").read_text())
    assert found["search"]["trials_per_model"] == 1 and found["base"]["hidden"] == 8
    assert reported == [tmp_path / "runs"]
    assert "compared 2 models" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--models", "simclr,bert"], ["--models", "simclr,simclr"]])
def test_unknown_and_repeated_models_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *arguments])
    assert "expected different names" in capsys.readouterr().err
