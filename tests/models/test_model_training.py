"""Training, resuming, evaluation and the command line, at the smallest sizes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from models.__main__ import main
from models.data import PairedData, generate
from models.evaluation import evaluate, majority, probe, summarise
from models.factorcl import FactorCLSUP
from models.report import step_times
from models.runs import MODELS, RunConfig, build
from models.training import Training, fit, frozen, history, load_run

TINY = RunConfig(
    data="synthetic",
    epochs=2,
    batch_size=16,
    lr=1e-3,
    hidden=12,
    feature_dim=8,
    encoder_layers=0,
    critic_hidden=12,
)


@pytest.fixture(scope="module")
def data() -> PairedData:
    return generate(100, seed=0)


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "pairs.npz"
    y = np.arange(60) % 2
    np.savez(path, a=rng.normal(size=(60, 3)) + y[:, None], b=rng.normal(size=(60, 5, 2)), y=y)
    return path


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_comes_back_from_its_folder(model, data, tmp_path):
    config = dataclasses.replace(TINY, model=model)
    module = fit(config, data, tmp_path, progress=False)
    assert [epoch for epoch, _ in history(tmp_path, "loss")] == [0, 1]
    assert len(history(tmp_path, "valid_loss")) == 2
    assert list(tmp_path.glob("tensorboard/*/events*"))
    assert_equal(weights(load_run(tmp_path, data)), weights(module))


def test_theta_and_phi_steps_leave_each_other_alone(data):
    module = Training(build(TINY, data), data, TINY)
    model, batch = module.model, data.batch(torch.arange(16))
    theta, phi = module.configure_optimizers()
    inner = {id(parameter) for parameter in model.inner_parameters()}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in inner}

    before = weights(module)
    with frozen(model.inner_parameters()):
        model.loss(batch)[0].backward()
    theta.step()
    after = weights(module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not changed & names

    model.inner_loss(batch).backward()
    phi.step()
    last = weights(module)
    assert {name for name in last if not torch.equal(after[name], last[name])} <= names
    assert any(not torch.equal(after[name], last[name]) for name in names)


class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise MemoryError


RANDOM = {"dropout": 0.3, "input_noise": 0.1, "weight_decay": 0.01, "inner_batch": "fresh", "club_critic": "shared"}


@pytest.mark.parametrize("model, changes", [("factorcl-ssl", {}), ("factorcl-ssl", RANDOM), ("cross-self", RANDOM)])
def test_a_killed_and_resumed_run_ends_with_the_same_weights(model, changes, data, tmp_path):
    config = dataclasses.replace(TINY, model=model, epochs=3, **changes)
    whole = weights(fit(config, data, tmp_path / "whole", progress=False))
    with pytest.raises(MemoryError):
        fit(config, data, tmp_path / "cut", progress=False, callbacks=[Kill()])
    assert_equal(weights(fit(config, data, tmp_path / "cut", progress=False, resume=True)), whole)
    assert [epoch for epoch, _ in history(tmp_path / "cut", "loss")] == [0, 1, 2]


def test_a_fresh_inner_batch_holds_training_rows_and_depends_on_the_generator_alone(data):
    module = Training(build(TINY, data), data, TINY)
    batch, again, other = (module.fresh(module.generator(draw))[0] for draw in (1, 1, 2))
    train = {tuple(row) for row in data.first.values[data.rows("train")].tolist()}
    rows = [tuple(row) for row in batch.x1.values.tolist()]
    assert len(set(rows)) == TINY.batch_size and set(rows) <= train
    assert torch.equal(batch.x1.values, again.x1.values) and not torch.equal(batch.x1.values, other.x1.values)


@pytest.mark.parametrize("kind, expected", [("same", 1), ("fresh", 3)])
def test_the_inner_steps_see_the_outer_batch_or_fresh_ones(kind, expected, data, tmp_path, monkeypatch):
    seen, compute = [], FactorCLSUP.inner_loss

    def record(model, batch, views):
        seen.append(batch.x1.values)
        return compute(model, batch, views)

    monkeypatch.setattr(FactorCLSUP, "inner_loss", record)
    fit(
        dataclasses.replace(TINY, epochs=1, batch_size=40, inner_steps=3, inner_batch=kind),
        data,
        tmp_path,
        progress=False,
    )
    assert len(seen) == 3 and len({tuple(values.flatten().tolist()) for values in seen}) == expected


def test_a_run_resumes_only_with_its_own_settings(data, tmp_path):
    fit(TINY, data, tmp_path, progress=False)
    with pytest.raises(ValueError, match="lr"):
        fit(dataclasses.replace(TINY, lr=0.1, epochs=3), data, tmp_path, progress=False, resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        fit(TINY, data, tmp_path / "new", progress=False, resume=True)


def test_the_probe_chooses_on_valid_and_never_reads_test_labels(data):
    features = data.first.values.numpy()
    score = probe(features, data)
    y = data.y.clone()
    y[data.rows("test")] = 1 - y[data.rows("test")]
    flipped = probe(features, dataclasses.replace(data, y=y))
    assert (flipped["valid"], flipped["C"]) == (score["valid"], score["C"])
    assert flipped["test"] == pytest.approx(1 - score["test"])


def test_evaluation_covers_the_factors(data):
    scores = evaluate(build(TINY, data), data)
    assert set(scores) == {"full", "S", "U1", "U2", "encoder"}
    assert set(evaluate(build(dataclasses.replace(TINY, model="simclr"), data), data)) == {"encoder"}
    assert 0.4 < majority(data) < 0.65


def test_a_summary_is_mean_and_sample_deviation():
    runs = [{"model": "m", "seed": seed, "probe": {"full": {"test": value}}} for seed, value in enumerate((0.5, 0.7))]
    (row,) = summarise(runs)
    assert (
        row["mean"] == pytest.approx(0.6) and row["deviation"] == pytest.approx(0.1414, abs=1e-4) and row["seeds"] == 2
    )


def test_step_times_measure_both_backends(data):
    times = step_times(TINY, data, steps=2)
    assert {"reference", "chunked"} <= set(times) and all(value > 0 for value in times.values())


SMALL_ARGS = [
    "--hidden",
    "8",
    "--feature-dim",
    "8",
    "--critic-hidden",
    "8",
    "--batch-size",
    "16",
    "--epochs",
    "1",
    "--quiet",
]


def test_the_command_line_fits_resumes_evaluates_and_reports(file, tmp_path, capsys):
    out = str(tmp_path / "run")
    fit_args = ["fit", "--data", str(file), "--out", out, *SMALL_ARGS]
    assert main(fit_args) == 0
    assert main([*fit_args, "--epochs", "2", "--resume"]) == 0
    assert main(["evaluate", "--out", out]) == 0
    assert main(["report", "--out", out]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64," in page and "factorcl-sup" in page and 'src="http' not in page
    assert capsys.readouterr().out.rstrip().endswith("report.html")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["probe"]["full"]["test"] <= 1


def test_the_demo_writes_its_report_and_results(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1", "--seeds", "1", "--quiet"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {run["model"] for run in results["runs"]} == {"factorcl-sup", "simclr", "supcon", "cross-self"}
    assert (tmp_path / "report.html").is_file()
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("demo done")


WRONG = {
    "missing file": (["fit", "--data", "absent.npz"], "no such file"),
    "unknown data": (["fit", "--data", "cifar"], "data must be"),
    "batch too large": (["fit", "--batch-size", "9999"], "batch_size is 9999"),
    "no epochs": (["fit", "--epochs", "0"], "epochs must be"),
    "resume nothing": (["fit", "--resume"], "holds no run"),
    "evaluate nothing": (["evaluate"], "holds no run"),
    "report nothing": (["report"], "holds no run"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_a_mistake_costs_one_clear_line_and_exit_code_two(case, tmp_path, capsys):
    args, message = WRONG[case]
    assert main([*args, "--quiet", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("model", ["factorcl-sup", "simclr"])
def test_head_layers_decide_the_depth_of_every_head(model, data):
    def linears(config):
        head = next(iter(build(config, data).heads1.values())) if "factorcl" in model else build(config, data).heads[0]
        return sum(isinstance(part, torch.nn.Linear) for part in head)

    config = dataclasses.replace(TINY, model=model)
    assert linears(config) == 3 and linears(dataclasses.replace(config, head_layers=0)) == 2
