"""Training: phases, determinism, resuming after a kill, checkpoints, choice of the best epoch."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from models.data import generate
from models.factorcl import FactorCLSUP
from models.files import replace_file
from models.registry import MODELS, build
from models.settings import read
from models.training import checkpoint as checkpoints
from models.training.checkpoint import LAST, PREVIOUS, WEIGHTS, load_weights, read_checkpoint
from models.training.fit import fit, load_run
from models.training.history import history
from models.training.phases import Training, frozen, scheduled
from tests.models.helpers import NEED_TEXT, assert_same_weights, config, mixed, weights


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


@pytest.fixture(scope="module")
def data():
    return generate(100, seed=0).standardised()


def training(data, settings):
    return Training(build(settings.name, settings.model, data, settings.seed), data, settings.training)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_comes_back_from_its_folder(model, data, tmp_path):
    if model in NEED_TEXT:
        pytest.importorskip("transformers")
        data = mixed()
    made = fit(config(model), data, tmp_path, progress=False).model
    assert [epoch for epoch, _ in history(tmp_path, "loss")] == [0, 1]
    assert len(history(tmp_path, "valid_loss")) == 2
    assert list(tmp_path.glob("tensorboard/*/events*"))
    assert_same_weights(weights(load_run(tmp_path, data)[1]), weights(made))


def test_a_phase_steps_its_own_parameters_alone(data):
    module = training(data, config())
    main, club = module.phases
    batch = data.batch(torch.arange(16))
    everything = list(module.model.parameters())
    assert {id(p) for phase in module.phases for p in phase.parameters} == {id(p) for p in everything}
    for phase, optimizer in zip((main, club), module.configure_optimizers(), strict=True):
        mine = {id(p) for p in phase.parameters}
        before = [p.detach().clone() for p in everything]
        with frozen(p for p in everything if id(p) not in mine):
            module.model.zero_grad()
            phase.loss(module.source(phase, batch)).total.backward()
        optimizer.step()
        changed = {id(p) for p, old in zip(everything, before, strict=True) if not torch.equal(p, old)}
        assert changed and changed <= mine


def test_frozen_leaves_what_was_frozen_before():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    with frozen([first, second]):
        assert not first.requires_grad
    assert first.requires_grad and not second.requires_grad


class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise MemoryError


RANDOM = {
    "training.input_noise": 0.1,
    "training.weight_decay": 0.01,
    "training.schedule": "cosine",
    "training.warmup": 2,
    "training.clip": 1.0,
    "training.corruption.drop": {"*": 0.2},
}
DROPOUT = RANDOM | {"model.encoder.dropout": 0.3}
INNER = {"model.inner_batch": "fresh", "model.club_critic": "shared", "model.inner_steps": 2}


@pytest.mark.parametrize(
    "model, changes",
    [
        ("factorcl-ssl", DROPOUT | INNER),
        ("cross-self", DROPOUT),
        ("mfn", RANDOM),
        ("mird", RANDOM | {"model.inner_steps": 2, "model.as_published": ["fresh_codes"]}),
        ("mdm", RANDOM | {"model.measure": "wasserstein", "model.fresh": True, "model.ramp": 0.9}),
        ("mdm", RANDOM | {"model.critic_steps": 2, "model.lengths": "moved"}),
        ("mag-xlnet", {"model.dropout": 0.3}),
        ("simclr", {"training.precision": "64"}),
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_weights(model, changes, data, tmp_path):
    if model in NEED_TEXT:
        pytest.importorskip("transformers")
        data = mixed(missing=False)
    settings = config(model, changes, epochs=3)
    whole = weights(fit(settings, data, tmp_path / "whole", progress=False).model)
    with pytest.raises(MemoryError):
        fit(settings, data, tmp_path / "cut", progress=False, callbacks=[Kill()])
    assert_same_weights(weights(fit(settings, data, tmp_path / "cut", progress=False, resume=True).model), whole)
    assert_same_weights(load_weights(tmp_path / "cut" / WEIGHTS), load_weights(tmp_path / "whole" / WEIGHTS))
    assert [epoch for epoch, _ in history(tmp_path / "cut", "loss")] == [0, 1, 2]


SETTINGS = {"epochs": 6, "select": "best", "patience": 50}


def _train(out, resume, die_after=None):
    """Runs in its own process: trains until it is killed after ``die_after`` CPU seconds or "while writing" a
    checkpoint.

    CPU seconds, because wall-clock times depend on the load of the machine. As with kill -9, the process has no time to
    react to the signal.
    """
    torch.set_num_threads(1)
    if die_after == "while writing":
        save, calls = torch.save, []

        def half(content, path):
            save(content, path)
            calls.append(path)
            if len(calls) == 2:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.torch.save = half
    elif die_after is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, die_after)
    data = generate(100, seed=0).standardised()
    fit(config("cross-self", DROPOUT, **SETTINGS), data, out, resume=resume, progress=False)
    (out / "seconds").write_text(str(time.process_time()))


def test_a_run_survives_kill_9_at_any_moment(tmp_path):
    """A run is killed five times, once while it writes a checkpoint; its weights equal those of an uninterrupted
    run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.models.test_training"])
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def run(*arguments):
        process = context.Process(target=_train, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    assert run(whole, False) == 0
    seconds, draw = float((whole / "seconds").read_text()), random.Random()
    assert run(cut, False, "while writing") == -signal.SIGKILL
    for _ in range(4):
        assert run(cut, True, draw.uniform(0.02, 0.2) * seconds) == -signal.SIGPROF
        read_checkpoint(cut / LAST)  # is complete, whenever the run was killed
    assert run(cut, True) == 0
    assert_same_weights(load_weights(cut / WEIGHTS), load_weights(whole / WEIGHTS))
    first, second = (read_checkpoint(folder / LAST)["state_dict"] for folder in (cut, whole))
    assert_same_weights(first, second)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(data, tmp_path):
    settings = config("simclr", epochs=3)
    whole = weights(fit(settings, data, tmp_path, progress=False).model)
    content = (tmp_path / LAST).read_bytes()
    for damage in (content[: len(content) // 2], b"", b"<html>", content[:-2000] + bytes(2000)):
        (tmp_path / LAST).write_bytes(damage)
        with pytest.raises(ValueError, match=r"last.ckpt is damaged .*previous.ckpt is the one before"):
            fit(settings, data, tmp_path, resume=True, progress=False)
    assert_same_weights(weights(fit(settings, data, tmp_path, resume="previous", progress=False).model), whole)


def test_files_of_another_run_are_named_in_one_line(data, tmp_path):
    """Files that a user copied from another run, or lost, give short messages that name the file."""
    first, other = config("simclr", epochs=2), config("early-fusion", epochs=2)
    for name, settings in (("a", first), ("b", other)):
        fit(settings, data, tmp_path / name, progress=False)
    folder = tmp_path / "a"
    shutil.copy(tmp_path / "b" / WEIGHTS, folder)
    shutil.copy(tmp_path / "b" / LAST, folder)
    longer = first.changed({"training.epochs": 3})
    for name, call in (
        (WEIGHTS, lambda: load_run(folder, data)),
        (LAST, lambda: fit(longer, data, folder, resume=True, progress=False)),
    ):
        with pytest.raises(ValueError, match=f"{name} does not fit the settings beside it") as error:
            call()
        assert len(str(error.value)) < 300 + len(str(folder))
    (folder / LAST).unlink()
    with pytest.raises(FileNotFoundError, match=r"previous.ckpt is there: --resume previous"):
        fit(longer, data, folder, resume=True, progress=False)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        load_run(folder, data)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_checkpoint_never_runs_code(data, tmp_path):
    torch.save({"state_dict": Evil()}, tmp_path / PREVIOUS)
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / PREVIOUS)


def test_a_file_is_replaced_whole_and_the_one_before_stays(tmp_path):
    path, kept = tmp_path / "a", tmp_path / "b"
    for text in ("one", "two", "three"):
        replace_file(path, lambda beside, text=text: beside.write_text(text), kept)
    assert (path.read_text(), kept.read_text()) == ("three", "two")

    def fails(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fails, kept)
    assert (path.read_text(), kept.read_text()) == ("three", "two")


def test_a_run_resumes_only_with_its_own_settings_and_data(data, tmp_path):
    settings = config("simclr")
    fit(settings, data, tmp_path, progress=False)
    longer = settings.changed({"training.epochs": 3})
    with pytest.raises(ValueError, match=r"settings differ from the run's: training.lr"):
        fit(longer.changed({"training.lr": 0.1}), data, tmp_path, progress=False, resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        fit(settings, data, tmp_path / "new", progress=False, resume=True)
    labels = data.labels.clone()
    labels[0] = 1 - labels[0]
    changed = dataclasses.replace(data, labels=labels)
    with pytest.raises(ValueError, match="data 'synthetic' has changed since"):
        fit(longer, changed, tmp_path, progress=False, resume=True)
    with pytest.raises(ValueError, match="has changed since"):
        load_run(tmp_path, changed)
    assert fit(longer, data, tmp_path, progress=False, resume=True).current_epoch == 3


def test_a_run_is_not_replaced_without_a_word(data, tmp_path):
    settings = config("simclr", epochs=1)
    fit(settings, data, tmp_path, progress=False)
    kept = (tmp_path / WEIGHTS).read_bytes()
    other = settings.changed({"training.seed": 1})
    with pytest.raises(ValueError, match=r"holds a run: continue with --resume, replace it with --overwrite"):
        fit(other, data, tmp_path, progress=False)
    assert (tmp_path / WEIGHTS).read_bytes() == kept and read(tmp_path) == settings
    fit(other, data, tmp_path, progress=False, overwrite=True)
    assert (tmp_path / WEIGHTS).read_bytes() != kept and read(tmp_path) == other


@pytest.mark.parametrize("changes", [{"training.batch_size": 100_000}, {"training.accelerator": "mps"}])
def test_a_refused_run_leaves_its_folder_as_it_was(changes, data, tmp_path):
    settings = config("simclr", epochs=1)
    with pytest.raises(ValueError, match=next(iter(changes)).split(".")[1]):
        fit(settings.changed(changes), data, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
    fit(settings, data, tmp_path / "old", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=next(iter(changes)).split(".")[1]):
        fit(settings.changed(changes), data, tmp_path / "old", progress=False, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("select", ["last", "best"])
def test_damaged_weights_are_written_again_from_the_checkpoint(select, data, tmp_path, caplog, monkeypatch):
    def falling(module, batch, index):
        module.log("valid_loss", torch.tensor(-float(module.current_epoch)), batch_size=batch.size)

    monkeypatch.setattr(Training, "validation_step", falling)  # the last epoch is the best
    settings = config("simclr", epochs=2, select=select)
    fit(settings, data, tmp_path, progress=False)
    whole = load_weights(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()  # write a new file, because the tensors in ``whole`` are mapped from this one
    (tmp_path / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"damaged.*--resume writes it again"):
        load_run(tmp_path, data)
    fit(settings, data, tmp_path, progress=False, resume=True)
    assert "was damaged; it is written again" in caplog.text
    assert_same_weights(load_weights(tmp_path / WEIGHTS), whole)


def test_damaged_weights_that_no_checkpoint_has_do_not_stop_a_longer_run(data, tmp_path, caplog, monkeypatch):
    values = [1.0, 2.0, 1.5]

    def script(module, batch, index):
        module.log("valid_loss", torch.tensor(values[module.current_epoch]), batch_size=batch.size)

    monkeypatch.setattr(Training, "validation_step", script)
    settings = config("simclr", epochs=2, select="best")
    fit(settings, data, tmp_path, progress=False)
    (tmp_path / WEIGHTS).unlink()  # write a new file, because the model's tensors are mapped from this one
    (tmp_path / WEIGHTS).write_bytes(b"cut")
    fit(settings.changed({"training.epochs": 3}), data, tmp_path, progress=False, resume=True)
    assert "held epoch 1, whose weights no checkpoint has" in caplog.text
    last = {name.removeprefix("model."): w for name, w in read_checkpoint(tmp_path / LAST)["state_dict"].items()}
    found = load_weights(tmp_path / WEIGHTS)
    assert_same_weights(found, {name: last[name] for name in found})


def test_the_best_weights_are_kept_and_training_stops_early(data, tmp_path, monkeypatch):
    values, seen = [3.0, 1.0, 2.0, 2.0, 2.0, 0.0], {}

    def script(module, batch, index):
        seen[module.current_epoch] = weights(module.model)
        module.log("valid_loss", torch.tensor(values[module.current_epoch]), batch_size=batch.size)

    monkeypatch.setattr(Training, "validation_step", script)
    settings = config("simclr", epochs=6, select="best", patience=3)
    module = fit(settings, data, tmp_path, progress=False)
    assert list(seen) == [0, 1, 2, 3, 4]
    assert_same_weights(weights(module.model), seen[1])
    assert_same_weights(load_weights(tmp_path / WEIGHTS), seen[1])


def test_scores_of_an_interrupted_run_say_so(data, tmp_path, monkeypatch, caplog):
    settings = config("early-fusion", epochs=3)

    def interrupt(module):
        if module.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "on_train_epoch_start", interrupt)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            fit(settings, data, tmp_path, progress=False)
    load_run(tmp_path, data)
    assert f"stopped after 1 of 3 epochs; continue with: python -m models fit --resume --out {tmp_path}" in caplog.text
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"training did not finish: python -m models fit --resume --out"):
        load_run(tmp_path, data)
    caplog.clear()
    fit(settings, data, tmp_path, resume=True, progress=False)
    load_run(tmp_path, data)
    assert not caplog.text


def test_schedules_rise_and_fall():
    settings = config(schedule="cosine", warmup=4).training
    assert [scheduled(settings, step, 14) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert scheduled(settings, 9, 14) == pytest.approx(0.5) and scheduled(settings, 14, 14) == pytest.approx(0)
    linear = dataclasses.replace(settings, schedule="linear")
    assert scheduled(linear, 9, 14) == pytest.approx(0.5)
    assert scheduled(config().training, 10**6, None) == 1.0


def test_a_fresh_inner_batch_holds_training_rows_and_depends_on_the_generator_alone(data):
    module = training(data, config())
    batch, again, other = (module.fresh(module.generator(draw)) for draw in (1, 1, 2))
    assert len(set(batch.rows.tolist())) == 16 and set(batch.rows.tolist()) <= set(data.rows("train").tolist())
    assert torch.equal(batch.rows, again.rows) and not torch.equal(batch.rows, other.rows)


@pytest.mark.parametrize("kind, expected", [("same", 1), ("fresh", 3)])
def test_the_inner_steps_see_the_outer_batch_or_fresh_ones(kind, expected, data, tmp_path, monkeypatch):
    read, steps, pairs, loss = [], [], FactorCLSUP.inner_pairs, FactorCLSUP.inner_loss
    monkeypatch.setattr(FactorCLSUP, "inner_pairs", lambda model, b: read.append(b.rows) or pairs(model, b))
    monkeypatch.setattr(FactorCLSUP, "inner_loss", lambda model, fixed: steps.append(1) or loss(model, fixed))
    changes = {"model.inner_steps": 3, "model.inner_batch": kind}
    fit(config(changes=changes, epochs=1, batch_size=40), data, tmp_path, progress=False)
    # Features that do not change during the phase are computed once per batch.
    assert len(steps) == 3 and len(read) == expected
    assert len({tuple(rows.tolist()) for rows in read}) == expected


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss of phase 'club' became nan in epoch 0: lower training\.lr"):
        fit(config(lr=1e30), data, tmp_path, progress=False)


@pytest.mark.parametrize("precision", ["bf16", "64"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_other_precisions_train(precision, clip, data, tmp_path):
    fit(config("simclr", precision=precision, clip=clip, epochs=1), data, tmp_path, progress=False)
    assert all(math.isfinite(value) for _, value in history(tmp_path, "loss"))


def test_one_line_an_epoch_where_there_is_no_terminal(data, tmp_path, capsys):
    fit(config("simclr"), data, tmp_path, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert json.loads((tmp_path / "run.json").read_text())["digest"] == data.digest()
