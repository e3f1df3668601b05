"""The command line: every command with the smallest settings, and the errors that mistakes give."""

import json
import os
import subprocess
import sys
import xml.dom.minidom

import numpy as np
import pytest

from models import demo, settings
from models.__main__ import main, parser
from models.data import SOURCES
from models.data.sources import two_digit_small
from models.data.tokenizer import load_tokenizer
from models.registry import MODELS
from models.report import uses
from models.report.speed import Seconds, step_times
from models.training import sweep
from tests.models.helpers import config, mixed

SMALL = ["model.encoder={hidden: 8, out_dim: 8}", "training={epochs: 1, batch_size: 16}"]
SETS = [argument for text in (*SMALL, "model.critic_hidden=8") for argument in ("--set", text)]


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


@pytest.fixture
def measured(monkeypatch):
    """Replaces the timing of steps, which has its own test and would take most of the time here."""
    times = {"reference": Seconds(0.004, 0.003, 0.005), "cpu": Seconds(0.002, 0.001, 0.003)}
    monkeypatch.setattr("models.report.write.step_times", lambda config, data: times)


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "pairs.npz"
    y = np.arange(60) % 2
    np.savez(path, a=rng.normal(size=(60, 3)) + y[:, None], b=rng.normal(size=(60, 5, 2)), y=y)
    return path


def test_a_run_is_fitted_resumed_evaluated_and_reported(measured, file, tmp_path, capsys):
    out = str(tmp_path / "run")
    arguments = ["fit", "--data", str(file), "--out", out, "--quiet", *SETS]
    assert main(arguments) == 0
    assert main([*arguments, "--set", "training.epochs=2", "--resume"]) == 0
    assert main(["evaluate", "--out", out]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scores"]["full"]["test"]["accuracy"] <= 1
    assert main(["evaluate", "--out", out, "--missing", "b", "--noise", "a=0.5"]) == 0
    assert "factorcl-sup, damaged" in capsys.readouterr().out
    assert main(["evaluate", "--out", out, "--missing", "c"]) == 2
    assert "drop names modality 'c'; the data has a, b" in capsys.readouterr().err
    assert main(["report", "--out", out]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "factorcl-sup" in page and "missing b" in page and str(tmp_path) not in page
    assert capsys.readouterr().out.rstrip().endswith("report.html")
    again = tmp_path / "again.yaml"
    again.write_text((tmp_path / "run" / "config.yaml").read_text())
    other = ["fit", "--config", str(again), "--out", out, "--quiet", "--seed", "3", "--evaluate"]
    assert main(other) == 2
    assert "continue with --resume, replace it with --overwrite" in capsys.readouterr().err
    assert main([*other, "--overwrite"]) == 0
    assert "constant" in capsys.readouterr().out


def test_resuming_notices_that_the_file_changed(file, tmp_path, capsys):
    arguments = ["fit", "--model", "simclr", "--data", str(file), "--out", str(tmp_path / "run"), "--quiet"]
    arguments += [argument for text in SMALL for argument in ("--set", text)]
    assert main(arguments) == 0
    content = dict(np.load(file))
    content["a"][0] += 1
    np.savez(file, **content)
    assert main([*arguments, "--set", "training.epochs=2", "--resume"]) == 2
    assert "the data 'pairs' has changed since" in capsys.readouterr().err


@pytest.fixture
def few_pictures(monkeypatch):
    monkeypatch.setattr(two_digit_small, "ROWS", (200, 60, 60))
    loss, estimate = uses.swapped_loss, uses.estimate
    monkeypatch.setattr(uses, "swapped_loss", lambda: loss((32, 64)))
    monkeypatch.setattr(uses, "estimate", lambda: estimate(300, 20))


def test_the_demo_writes_its_report_and_results(measured, few_pictures, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1", "--seeds", "1", "--quiet"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {run["model"] for run in results["runs"]} == set(demo.MODELS) == set(results["seconds_per_step"])
    page = (tmp_path / "report.html").read_text()
    assert "http://www.w3.org/2000/svg" in page and "src=" not in page and 'href="http' not in page
    assert "prefers-color-scheme:dark" in page and "viewport" in page and "currentColor" in page
    assert page.count('class="legend"') == 1 and "scores better than" in page
    assert "Use 1" in page and "Use 2" in page and "95 % interval" in page
    for figure in page.split("<svg")[1:]:
        xml.dom.minidom.parseString("<svg" + figure.split("</svg>")[0] + "</svg>")
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("demo done")


def test_a_demo_of_other_settings_makes_room_and_leaves_what_is_not_its_own(tmp_path):
    bases = {model: settings.starting_point(model, demo.DATA) for model in demo.MODELS[:2]}
    first, second = demo.MODELS[:2]

    def run(name, settings):
        settings.save(tmp_path / name)
        (tmp_path / name / "weights.safetensors").write_text("")

    run(f"{first}-seed0", bases[first])
    run(f"{first}-seed1", bases[first].changed({"training.seed": 1, "training.epochs": 1}))
    run(f"{second}-seed7", bases[second].changed({"training.seed": 7}))
    run(f"{second}-seed0", bases[second].changed({"data.name": "digits"}))
    run("mine", bases[second])
    old = tmp_path / f"{second}-seed1"
    run(old.name, bases[second])
    text = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(text + "of_another_version: {}\n")
    removed = demo.make_room(tmp_path, bases, range(2))
    assert {path.name for path in removed} == {f"{first}-seed1", f"{second}-seed7", old.name}
    assert {path.name for path in tmp_path.iterdir()} == {f"{first}-seed0", f"{second}-seed0", "mine"}
    assert demo.make_room(tmp_path / "absent", bases, range(2)) == []


def test_a_regression_target_is_reported_too(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SOURCES, "mixed", lambda seed: mixed("regression"))
    out = str(tmp_path / "runs")
    command = ["compare", "--data", "mixed", "--models", "early-fusion,late-fusion", "--seeds", "1", "--out", out]
    found = tmp_path / "results" / "found.json"
    sizes = ["--set", "training={epochs: 1, batch_size: 16}", "--set", "model.hidden=8", "--json", str(found)]
    assert main([*command, *sizes, "--quiet"]) == 0
    assert "test mae" in capsys.readouterr().out and "pearson" in (tmp_path / "runs" / "report.html").read_text()
    base = json.loads(found.read_text())["base"]
    assert base["early-fusion"]["model"]["hidden"] == 8 and base["late-fusion"]["training"]["epochs"] == 1


def test_a_sweep_makes_one_table_and_keeps_what_is_done(file, tmp_path, capsys, monkeypatch):
    """Fits are replaced by a command that copies one result; the next test parses the real command."""
    done = evaluated(file, tmp_path / "once", capsys)

    def copy(job, config_file):
        result = done | {"seed": job.config.seed}
        content = f"import pathlib as p, json; d = p.Path({str(job.folder)!r}); d.mkdir(parents=True, exist_ok=True);"
        content += f"(d / 'config.yaml').write_text(p.Path({str(config_file)!r}).read_text());"
        content += "(d / 'weights.safetensors').write_text('');"
        return [sys.executable, "-S", "-c", content + f"(d / 'results.json').write_text({json.dumps(result)!r})"]

    monkeypatch.setattr(sweep, "command", copy)
    arguments = ["sweep", "--model", "simclr", "--data", str(file), "--seeds", "0-1", "--jobs", "2"]
    arguments += ["--grid", "model.temperature=0.1,0.5", "--out", str(tmp_path / "sweep")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count(": done") == 4 and "swept 4 runs" in said
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out.count(": kept") == 4
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["summary"]
    found = {row["model"]: row["seeds"] for row in rows if row["model"].startswith("simclr")}
    assert found == {"simclr temperature=0.1": 2, "simclr temperature=0.5": 2}
    assert main([*arguments, "--set", "training.lr=0.7"]) == 2
    assert "holds a run with other settings: replace it with --overwrite" in capsys.readouterr().err
    monkeypatch.setattr(sweep, "command", lambda job, path: [sys.executable, "-S", "-c", "raise SystemExit('no')"])
    assert main([*arguments, "--seeds", "5"]) == 2
    assert "2 of 2 runs failed" in capsys.readouterr().err


def evaluated(file, out, capsys):
    arguments = ["fit", "--model", "simclr", "--data", str(file), "--out", str(out), "--quiet", "--evaluate"]
    assert main(arguments + [argument for text in SMALL for argument in ("--set", text)]) == 0
    capsys.readouterr()
    return json.loads((out / "results.json").read_text())


def test_a_job_of_a_sweep_is_a_command_that_resumes_where_it_can(tmp_path):
    (job,) = sweep.jobs(config("simclr"), {}, (3,), tmp_path)
    first = parser().parse_args(sweep.command(job, tmp_path / "c.yaml")[3:])
    assert first.command == "fit" and first.evaluate and first.out == tmp_path / "seed3" and not first.resume
    job.config.save(job.folder)
    (job.folder / "last.ckpt").write_text("")
    assert parser().parse_args(sweep.command(job, tmp_path / "c.yaml")[3:]).resume == "last"
    other = parser().parse_args(sweep.command(job._replace(config=config("simclr", lr=0.7)), tmp_path / "c.yaml")[3:])
    assert not other.resume and other.overwrite


def test_the_jobs_of_a_sweep_find_the_package_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "command", lambda job, path: [sys.executable, "-c", "import models"])
    assert sweep.run(sweep.jobs(config("simclr"), {}, (3,), tmp_path), 1) == []
    assert "seed3: done" in capsys.readouterr().out


def test_models_data_sets_and_configs_are_listed(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("factorcl-sup", "mult", "utd-mhad", "mfn/digits"):
        assert name in said
    assert "  mosi                CMU-MOSI: 2,199 utterances" in said and "``" not in said


@pytest.mark.parametrize("model", MODELS)
def test_the_settings_of_a_model_are_listed_with_their_meaning(model, capsys, tmp_path):
    assert main(["list", model]) == 0
    said = capsys.readouterr().out
    assert MODELS[model].summary in said and "# training.corruption" in said
    defaults = tmp_path / "defaults.yaml"
    defaults.write_text(said.split("\n# model")[0].partition("\n")[2])
    found = settings.from_file(defaults)
    assert found == settings.from_dict({"model": {"name": model}, "data": {"name": demo.DATA}})
    explained = said.partition("\n# model")[2]
    for name in (name.rpartition(".")[2] for name in found.flat() if not name.startswith("model.base.")):
        assert name in explained, name


def test_step_times_measure_every_backend():
    times = step_times(config(), mixed().choose(("frames", "vectors")), steps=3)
    assert {"reference", "chunked"} <= set(times)
    assert all(0 < s.low <= s.median <= s.high for s in times.values())


def test_looking_into_a_file_does_not_wait_for_the_trainer(file):
    code = "import sys; from models.__main__ import main; assert main(['inspect', sys.argv[1]]) == 0; "
    code += "sys.exit(', '.join({'lightning', 'matplotlib', 'sklearn', 'torchmetrics'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "modality a: vectors of 3" in done.stdout and done.returncode == 0, done.stderr


def test_arrays_without_labels_train_a_model_that_needs_none(tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    np.savez(tmp_path / "pairs.npz", left=values, right=values + 1)
    arguments = ["fit", "--data", str(tmp_path / "pairs.npz"), "--quiet", "--out", str(tmp_path / "run"),
                 "--set", "training.epochs=1", "--set", "training.batch_size=16"]  # fmt: skip
    assert main([*arguments, "--model", "simclr"]) == 0
    assert main(["evaluate", "--out", str(tmp_path / "run")]) == 2
    assert "no labels" in capsys.readouterr().err
    assert main([*arguments, "--model", "late-fusion", "--overwrite"]) == 2
    assert "needs labels, the data has none" in capsys.readouterr().err
    # Resuming needs no settings, because the run's folder has them.
    assert main(["fit", "--resume", "--out", str(tmp_path / "run"), "--set", "training.epochs=2", "--quiet"]) == 0
    assert "trained simclr on pairs for 2 epochs" in capsys.readouterr().out


WRONG = {
    "missing file": (["fit", "--data", "absent.npz"], "no such file"),
    "unknown data": (["fit", "--data", "cifar"], "data must be digits"),
    "unknown model": (["fit", "--model", "bert"], "model must be one of"),
    "unknown setting": (["fit", "--set", "training.epoch=3"], "did you mean training.epochs?"),
    "setting without its part": (["fit", "--set", "epochs=3"], "did you mean training.epochs?"),
    "other name without its part": (["fit", "--set", "learning_rate=3"], "did you mean training.lr?"),
    "batch too large": (["fit", "--set", "training.batch_size=9999"], "set training.batch_size to at most"),
    "frames of vectors": (["fit", "--set", "training.corruption.frames={left: 0.5}"], "which has no frames"),
    "negative noise": (["fit", "--set", "training.corruption.noise={left: -1}"], "must not be negative"),
    "out is a file": (["fit", "--out", __file__], "--out must be a folder"),
    "misspelt data": (["fit", "--data", "mossi"], "did you mean mosi?"),
    "resume and overwrite": (["fit", "--resume", "--overwrite"], "use only one of them"),
    "no epochs": (["fit", "--set", "training.epochs=0"], "epochs must be"),
    "resume nothing": (["fit", "--resume"], "holds no run"),
    "evaluate nothing": (["evaluate"], "holds no run"),
    "report nothing": (["report"], "holds no run"),
    "config and model": (["fit", "--config", "a.yaml", "--model", "mult"], "leave out --model"),
    "no config": (["fit", "--config", "absent.yaml"], "no such file: absent.yaml"),
    "noise": (["evaluate", "--noise", "a"], "NAME=DEVIATION"),
    "grid": (["sweep", "--grid", "training.lr"], "KEY=V1,V2"),
    "grid without a name": (["sweep", "--grid", "=1"], "KEY=V1,V2"),
    "grid twice": (["sweep", "--grid", "training.lr=1", "--grid", "training.lr=2"], "names training.lr twice"),
    "grid of one value": (["sweep", "--grid", "training.lr=0.1,0.1"], "a value of training.lr twice: 0.1, 0.1"),
    "setting of no model": (["compare", "--set", "model.sizes=1"], "there is no setting model.sizes in"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_a_mistake_costs_one_clear_line_and_exit_code_two(case, tmp_path, capsys):
    arguments, message = WRONG[case]
    if case == "noise":
        config().save(tmp_path / "out")
    assert main([arguments[0], "--quiet", "--out", str(tmp_path / "out"), *arguments[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--models", "simclr,bert"], ["--models", "simclr,simclr"]])
def test_unknown_and_repeated_models_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *arguments])
    assert "expected different names" in capsys.readouterr().err


def test_misspelt_models_and_analyses_are_answered_with_the_nearest_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--models", "simclr,late-fusoin"])
    assert "did you mean late-fusion?" in capsys.readouterr().err
    assert main(["analyse", "mdm-critics", "--out", str(tmp_path / "out")]) == 2
    assert "did you mean mdm-critic?" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_environment_without_the_extra_costs_one_line(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError('no yaml', name='yaml')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "models", "list"], env=environment, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("error: models/ needs the package yaml: pip install")
    assert len(done.stderr.splitlines()) == 1


def test_a_package_that_is_missing_is_one_line_that_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr("models.commands.load_data", lambda config: load_tokenizer("any/name"))
    assert main(["fit", "--model", "misa", "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: Hugging Face text encoders") and len(error.splitlines()) == 1
