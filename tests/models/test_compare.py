"""Comparisons and sweeps: choices use only validation rows, all models get equally many trials, results are kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from models import compare as comparing
from models.batch import Target
from models.compare import SEARCH_SEED, compare, search
from models.data import SOURCES, Dataset, Modality, generate
from models.evaluation import runs
from models.evaluation.probes import Probe, input_features, probe
from models.evaluation.scores import evaluate, references, validation_value
from models.evaluation.summary import best_rows, summarise, table, verdicts
from models.registry import build
from models.training.search import SEQUENCES, VECTORS, applicable, trials
from models.training.sweep import finished, jobs
from tests.models.helpers import config

TINY = config(epochs=1)


@pytest.fixture(autouse=True)
def small_data(monkeypatch, one_thread):
    monkeypatch.setitem(SOURCES, "synthetic", lambda seed: generate(100, seed=seed))


def data():
    return generate(100).standardised()


def flipped(data):
    """The same rows with every test label changed."""
    labels = data.labels.clone()
    labels[data.rows("test")] = 1 - labels[data.rows("test")]
    return dataclasses.replace(data, labels=labels)


@pytest.mark.parametrize("space", [VECTORS, SEQUENCES])
def test_trials_start_with_the_defaults_and_cover_every_value(space):
    drawn = trials(space, 9)
    assert len(drawn) == 9 and drawn[0] == {} and drawn == trials(space, 9)
    for name, values in space.items():
        assert {trial[name] for trial in drawn[1:]} == set(values)
    for model in ("factorcl-sup", "simclr", "early-fusion"):
        base = config(model)
        for trial in drawn:
            base.changed(applicable(base, trial))
            assert {"training.lr"} <= set(applicable(base, trial)) or trial == {}
    with pytest.raises(ValueError, match="number of trials"):
        trials(space, 0)


@pytest.mark.parametrize("model", ["factorcl-sup", "early-fusion"])
def test_the_validation_value_does_not_depend_on_test_rows(model):
    settings = config(model)
    made = build(settings.name, settings.model, data(), 0)
    changed = flipped(data())
    changed["x1"].values[changed.rows("test")] = 100.0
    assert validation_value(made, changed) == validation_value(made, data())


def test_the_probe_chooses_on_valid_and_never_reads_test_labels():
    features = data()["x1"].values.numpy()
    score, other = probe(features, data()), probe(features, flipped(data()))
    assert (other["valid"], other["strength"]) == (score["valid"], score["strength"])
    assert other["test"]["accuracy"] == pytest.approx(1 - score["test"]["accuracy"])


def test_a_probe_of_a_regression_target_is_a_ridge():
    x = torch.randn(200, 5)
    y = x @ torch.arange(5.0) + 0.1 * torch.randn(200)
    made = Dataset("line", (Modality("x", x),), y, Target.regression(), torch.arange(200) % 3)
    found = probe(x.numpy(), made)
    assert found["test"]["mae"] < 0.3 and found["test"]["pearson"] > 0.99 and found["strength"] == 1.0
    assert references(made)["constant"]["-"]["test"]["mae"] > 3


def test_a_ridge_on_alike_features_with_outliers_falls_back_to_a_constant():
    torch.manual_seed(11)
    size = (1.5 * torch.randn(300, 1)).exp()
    x, y = size * (torch.randn(300, 10) @ torch.randn(10, 900)), torch.randn(300)
    made = Dataset("noise", (Modality("x", x),), y, Target.regression(), torch.arange(300) % 3)
    constant = references(made)["constant"]["-"]["test"]["mae"]
    assert probe(x.numpy(), made)["test"]["mae"] < 1.05 * constant


def test_a_class_without_a_train_row_is_never_predicted():
    labels = torch.tensor([0, 1] * 20 + [2] * 10)
    split = torch.tensor([0] * 30 + [1] * 10 + [2] * 10)
    made = Dataset("d", (Modality("x", torch.randn(50, 3)),), labels, Target.classes(3), split)
    found = Probe(made["x"].values.numpy(), made)
    assert found.predict(made["x"].values.numpy()).argmax(1).max() < 2
    with pytest.raises(ValueError, match="one class only in its train rows"):
        Probe(made["x"].values.numpy(), dataclasses.replace(made, labels=labels.clamp(max=0)))


def test_a_search_takes_the_first_setting_of_the_highest_validation_value(monkeypatch, tmp_path):
    scores, seen = iter([0.2, 0.7, None, 0.7]), []
    monkeypatch.setattr(
        comparing, "trial", lambda config, folder, progress: seen.append(config) or {"valid": next(scores)}
    )
    best, tried = search(TINY, 4, tmp_path)
    assert [entry["valid"] for entry in tried] == [0.2, 0.7, None, 0.7]
    assert best == TINY.changed(applicable(TINY, trials(VECTORS, 4)[1]))
    assert {config.seed for config in seen} == {SEARCH_SEED}


def test_a_trial_that_diverges_is_kept_as_a_failure(tmp_path):
    found = comparing.trial(TINY.changed({"training.lr": 1e30}), tmp_path, progress=False)
    assert found["valid"] is None and "lower training.lr" in found["failed"]


def test_a_comparison_reports_choices_searches_and_references(tmp_path):
    bases = {"factorcl-sup": TINY, "mult": config("mult", epochs=1)}
    found = compare(bases, range(2), tmp_path / "out", number=2, progress=False)
    assert json.loads(json.dumps(found)) == found
    for model, entries in found["search"]["models"].items():
        best = max(entries, key=lambda entry: entry["valid"])
        assert len(entries) == 2 and found["chosen"][model].items() <= best["settings"].items()
        assert all("test" not in entry for entry in entries)
    assert found["representation"] == {"factorcl-sup": "full", "mult": "head"}
    rows = {(row["model"], row["representation"]): row for row in found["summary"]}
    for untrained in (("factorcl-sup", "untrained full"), ("mult", "untrained fused")):
        assert untrained in rows
    assert {("constant", "-"), ("linear", "x1"), ("linear", "x2"), ("linear", "input")} <= set(rows)
    assert all(row["seeds"] == 2 for row in rows.values())
    values = [run["scores"]["full"]["test"]["accuracy"] for run in found["runs"] if run["model"] == "factorcl-sup"]
    assert rows["factorcl-sup", "full"]["mean"] == pytest.approx(np.mean(values))


def test_runs_are_kept_for_the_same_settings_at_the_same_clean_commit_only(monkeypatch, tmp_path):
    calls = []

    def run(config, folder):
        config.save(folder)
        calls.append(config)
        return {"call": len(calls)}

    def kept(config=TINY):
        return comparing._kept(tmp_path, "kept.json", config, run)["call"]

    other = TINY.changed({"training.lr": 0.5})
    monkeypatch.setattr(comparing, "commit", lambda: "abc")
    assert [kept(), kept()] == [1, 1]
    assert kept(other) == 2
    monkeypatch.setattr(comparing, "commit", lambda: "abd")
    assert kept(other) == 3
    monkeypatch.setattr(comparing, "commit", lambda: "abd+changes")
    assert [kept(other) for _ in range(2)] == [4, 5]


def test_runs_of_one_model_are_labelled_by_the_settings_in_which_they_differ(monkeypatch, tmp_path):
    base = config("simclr")
    made = {
        "a": base,
        "b": base.changed({"training.seed": 1}),
        "c": base.changed({"model.temperature": 0.5, "training.lr": 0.5}),
        "d": config("mult"),
    }
    for name, settings in made.items():
        settings.save(tmp_path / name)
    result = {"scores": {}}
    monkeypatch.setattr(
        runs, "evaluate_run", lambda folder: result | {"model": made[folder.name].name, "seed": made[folder.name].seed}
    )
    found = {folder.name: result["label"] for folder, result in runs.results_below(tmp_path)}
    plain = "simclr temperature=0.1, lr=0.001"
    assert found == {"a": plain, "b": plain, "c": "simclr temperature=0.5, lr=0.5", "d": "mult"}
    assert list(found) == ["a", "b", "c", "d"]


def test_representations_are_those_of_the_paper():
    made = {name: build(name, config(name).model, data(), 0) for name in ("factorcl-sup", "simclr", "mult")}
    assert set(evaluate(made["factorcl-sup"], data()).scores) == {"full", "S", "U1", "U2", "encoder"}
    assert set(evaluate(made["simclr"], data()).scores) == {"encoder"}
    assert set(evaluate(made["mult"], data()).scores) == {"head", "fused"}


def test_input_features_pool_sequences_and_tokens_and_pass_vectors():
    offsets = torch.tensor([0, 4, 12])
    tokens = Modality("c", torch.tensor([1, 1, 2]), torch.tensor([0, 3, 3]))
    modalities = (Modality("a", torch.arange(12.0)[:, None], offsets), Modality("b", torch.eye(2)), tokens)
    made = Dataset("d", modalities, torch.tensor([0, 1]), Target.classes(2), torch.tensor([0, 1]))
    parts = input_features(made, segments=2)
    np.testing.assert_allclose(parts["a"][:, [0, 2]], [[0.5, 2.5], [5.5, 9.5]])
    np.testing.assert_array_equal(parts["b"], np.eye(2))
    np.testing.assert_allclose(parts["c"], [[2 / 3, 1 / 3, 0], [0, 0, 0]])
    assert parts["input"].shape == (2, 4 + 2 + 3)


def result(model, seed, value, metric="accuracy"):
    return {"model": model, "seed": seed, "metric": metric, "scores": {"head": {"test": {metric: value}}}}


def test_a_summary_is_mean_and_sample_deviation_and_the_best_is_marked():
    runs = [result("a", 0, 0.5), result("a", 1, 0.7), result("b", 0, 0.8), result("b", 1, 0.82)]
    first, second = summary = summarise(runs)
    assert first["mean"] == pytest.approx(0.6) and first["deviation"] == pytest.approx(0.1414, abs=1e-4)
    assert second["seeds"] == 2 and best_rows(summary) == [1]
    assert [line[0] for line in table(summary).splitlines()] == [" ", " ", "*"]
    assert verdicts(summary, {"a": "head", "b": "head"}) == ["a (head) loses to b.", "b (head) beats a."]
    assert "0.810 ± 0.014" in table(summary)
    lower = summarise([result(name, s, v, "mae") for name, v in (("a", 0.5), ("b", 0.8)) for s in (0, 1)])
    assert best_rows(lower) == [0] and verdicts(lower, {"a": "head", "b": "head"})[0] == "a (head) beats b."


def test_a_model_is_held_against_the_linear_model_of_every_input():
    linear = {"text": {"test": {"mae": 0.3}}, "input": {"test": {"mae": 0.9}}}
    runs = [result("a", seed, 0.5, "mae") | {"references": {"linear": linear}} for seed in (0, 1)]
    assert verdicts(summarise(runs), {"a": "head"}) == ["a (head) beats linear (input); loses to linear (text)."]


def test_a_metric_that_a_seed_does_not_have_is_a_dash():
    runs = [result("a", seed, 0.5) for seed in (0, 1)]
    for run, value in zip(runs, (0.2, float("nan")), strict=True):
        run["scores"]["head"]["test"]["pearson"] = value
    (row,) = summarise(runs)
    assert np.isnan([row["metrics"]["pearson"][key] for key in ("mean", "deviation")]).all()
    assert table([row]).splitlines()[1].split()[-1] == "-" and "0.500 ± 0.000" in table([row])


def test_one_seed_has_no_deviation_and_nothing_beats_anything():
    summary = summarise([result("a", 0, 0.5), result("b", 0, 0.8)])
    first, second, why = verdicts(summary, {"a": "head", "b": "head"})
    assert first == "a (head) scores worse than b." and second == "b (head) scores better than a."
    assert why.startswith("One seed") and "±" not in table(summary)


def test_a_grid_has_a_folder_a_run_and_knows_what_is_finished(tmp_path):
    axes = {"training.lr": [0.1, 0.2], "model.temperature": [1.0]}
    todo = jobs(config("simclr"), axes, (0, 3), tmp_path)
    assert [str(job.folder.relative_to(tmp_path)) for job in todo] == [
        f"lr={lr},temperature=1.0/seed{seed}" for lr in (0.1, 0.2) for seed in (0, 3)
    ]
    assert todo[3].config.training.lr == 0.2 and todo[3].config.seed == 3
    assert not finished(todo[0])
    todo[0].config.save(todo[0].folder)
    (todo[0].folder / "results.json").write_text("{}")
    assert finished(todo[0]) and not finished(todo[0]._replace(config=todo[1].config))
    with pytest.raises(ValueError, match=r"no setting training.lrr; did you mean training.lr\?"):
        jobs(config("simclr"), {"training.lrr": [1]}, (0,), tmp_path)
