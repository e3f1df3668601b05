"""In several processes, every model has the same curves and weights as in one process on the same batches."""

import multiprocessing
import os
import signal
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from models.batch import Batch, Inputs
from models.registry import MODELS
from models.shares import Share, average_gradients, by_rows, own_rows, sharing
from models.training.checkpoint import LAST, WEIGHTS, load_weights, read_checkpoint
from models.training.distributed import _raise_first, check_shares, launch, processes_of
from models.training.fit import fit
from models.training.history import columns, history
from tests.models.helpers import NEED_TEXT, config, mixed

RANKS = 2
PAIR = ("frames", "vectors")
INNER = {"model.inner_batch": "fresh", "model.inner_steps": 2, "model.club_critic": "shared"}
# Every model with default settings, and with settings that take other code paths.
TRAINABLE = [name for name in MODELS if name not in NEED_TEXT or find_spec("transformers")]
CASES = {name: (name, {}) for name in TRAINABLE} | {
    "factorcl-ssl, fresh": ("factorcl-ssl", INNER),
    "factorcl-ssl of three": ("factorcl-ssl", {}),
    "mfm, surrogates": ("mfm", {"model.surrogate": True}),
    "mdm, parameters": ("mdm", {"model.balance": "parameters"}),
    "mdm, wasserstein": ("mdm", {"model.measure": "wasserstein", "model.fresh": True}),
    "mdm around simclr": ("mdm", {"model.base": "simclr", "model.representation": "encoder"}),
}
RANDOM = {
    "training.input_noise": 0.1,
    "training.clip": 1.0,
    "training.weight_decay": 0.01,
    "training.corruption.drop": {"*": 0.1},
}


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


def settings(case, devices):
    """Batches of 15 rows, few of them usable, so that the ranks' shares differ. Dropout is off, because ranks draw
    different masks."""
    model, changes = CASES[case]
    found = config(model, RANDOM | changes, batch_size=15, precision="64", devices=devices)
    return found.changed({name: 0.0 for name in found.flat() if name.endswith("dropout")})


def data_of(case):
    data = mixed()
    return data.choose(PAIR) if case.startswith("factorcl") and "three" not in case else data


def sweep(folder, devices):
    for case in CASES:
        fit(settings(case, devices), data_of(case), folder / case, progress=False)


def _many(folder):
    """Runs in each of several processes: all cases in one process group, because starting is slow; then rank 1
    fails."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    _units(rank, folder)
    sweep(folder, 1)
    dist.destroy_process_group()
    if rank == 1:
        raise ValueError("one of them has failed")
    time.sleep(600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    one, many = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("many")
    # launch() must end the other process, which would sleep for 600 seconds.
    with pytest.raises(ValueError, match="one of them has failed"):
        launch(_many, (many,), RANKS)
    sweep(one, 1)
    return one, many


@pytest.mark.parametrize("case", CASES)
def test_curves_and_weights_are_those_of_one_process(runs, case):
    one, many = (folder / case for folder in runs)
    assert columns(many) == columns(one) and "loss" in columns(one) and "valid_loss" in columns(one)
    for column in columns(one):
        for (epoch, value), (other, expected) in zip(history(many, column), history(one, column), strict=True):
            assert epoch == other and value == pytest.approx(expected, rel=1e-6, abs=1e-9), (column, epoch)
    found, expected = load_weights(many / WEIGHTS), load_weights(one / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


class Encoder(torch.nn.Module):
    """A module with methods for each kind of argument and result; ``seen`` is the number of rows that it was given."""

    seen = 0

    @by_rows
    def encode(self, x, named, names, steps=1):
        self.seen = len(x.values)
        assert names == ("a", "b") and steps == 2 and len(named["y"]) == self.seen == len(x.present)
        return {"both": [x.values * 2, torch.rand(self.seen, 1)], "inner": self.inner(named["y"])}

    @by_rows
    def inner(self, y):
        assert len(y) == self.seen  # rows were not divided a second time
        return y + 1


def _units(rank, folder):
    model, found = Encoder(), {}
    for rows in (1, 2, 5):
        torch.manual_seed(3)
        with sharing(rank, RANKS):
            values = torch.arange(rows * 2.0).view(rows, 2).requires_grad_()
            x = Inputs(values, None, torch.ones(rows, dtype=torch.bool))
            out = model.encode(x, {"y": torch.arange(rows)}, ("a", "b"), steps=2)
            assert model.seen == (rows if rows < RANKS else Share(rank, RANKS).sizes(rows)[rank])
            out["both"][0].sum().backward()
            found[f"{rows}"] = [*out["both"], out["inner"], values.grad, torch.rand(3)]
    used, idle, one = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    used.grad, one.grad = torch.full((2,), 1.0 + rank), torch.ones(2) if rank else None
    with sharing(rank, RANKS):
        average_gradients([used, idle, one])
    found["gradients"] = [used.grad, one.grad]
    assert idle.grad is None
    with sharing(rank, RANKS), pytest.raises(ValueError, match="a row for each of 2 processes, got 1"):
        batch = Batch({"x": Inputs(torch.zeros(1, 2))}, None, None, torch.zeros(1))
        with own_rows(batch):
            pass
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture
def units(runs):
    return [torch.load(runs[1] / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_are_computed_in_parts_and_every_rank_has_them_all(units, rows):
    (both, noise, inner, gradient, after), other = (found[f"{rows}"] for found in units)
    x = torch.arange(rows * 2.0).view(rows, 2)
    assert torch.equal(both, 2 * x) and torch.equal(inner, torch.arange(rows) + 1)
    for mine, theirs in zip(units[0][f"{rows}"][:3], other[:3], strict=True):
        assert torch.equal(mine, theirs)
    # The mean over ranks is one process's gradient; each rank has the gradient of its own rows.
    assert torch.equal((gradient + other[3]) / RANKS, torch.full((rows, 2), 2.0))
    # Ranks draw different numbers for their own rows, and the same numbers before and afterwards.
    assert len(set(noise.flatten().tolist())) == rows and torch.equal(after, other[4])


def test_gradients_are_averaged_and_those_that_nobody_has_stay_away(units):
    for found in units:
        assert [g.tolist() for g in found["gradients"]] == [[1.5, 1.5], [0.5, 0.5]]


def test_one_process_draws_what_it_drew_before():
    torch.manual_seed(0)
    expected = torch.rand(3, 1)
    torch.manual_seed(0)
    with sharing(0, 1):
        x = Inputs(torch.zeros(3, 2), None, torch.ones(3, dtype=torch.bool))
        assert torch.equal(Encoder().encode(x, {"y": torch.arange(3)}, ("a", "b"), steps=2)["both"][1], expected)


def test_rows_that_do_not_agree_are_refused():
    with sharing(0, RANKS), pytest.raises(ValueError, match=r"same number of rows, got \[3, 4\]"):
        Encoder().encode(Inputs(torch.zeros(3, 2)), {"y": torch.zeros(4)}, ("a", "b"))


class KillTheRun(Callback):
    """Kills the process that started the ranks with SIGKILL in the second epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx == 0:
            (self.folder / f"pid{trainer.global_rank}").write_text(str(os.getpid()))
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)


def _killed(folder):
    torch.set_num_threads(1)
    fit(settings("supcon", RANKS), mixed(), folder / "cut", progress=False, callbacks=[KillTheRun(folder)])


def test_a_run_of_two_processes_survives_kill_9_and_goes_on_with_one(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    end = time.monotonic() + 20
    for rank in range(RANKS):
        while running(int((tmp_path / f"pid{rank}").read_text())):
            assert time.monotonic() < end, f"process {rank} outlives the run"
            time.sleep(0.05)
    assert read_checkpoint(tmp_path / "cut" / LAST)["epoch"] == 0
    fit(settings("supcon", 1), mixed(), tmp_path / "cut", progress=False, resume=True)
    fit(settings("supcon", 1), mixed(), tmp_path / "whole", progress=False)
    found, expected = (load_weights(tmp_path / name / WEIGHTS) for name in ("cut", "whole"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-9)


def running(pid):
    """Whether a process is running. Zombies whose parent was killed do not count."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_process_is_named():
    ranks = [SimpleNamespace(exitcode=1), SimpleNamespace(exitcode=-9)]
    with pytest.raises(RuntimeError, match=r"process 1 of 2 was ended by SIGKILL; continue with --resume"):
        _raise_first(ranks, None)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
SLURM |= {"SLURM_JOB_NAME": "train", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("env, kind", [(TORCHRUN, "TorchElasticEnvironment"), (SLURM, "SLURMEnvironment")])
def test_processes_of_torchrun_and_slurm_are_found(env, kind, monkeypatch):
    assert processes_of(1).environment is None and processes_of(3).number == 3
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = processes_of(1)
    assert (found.devices, found.nodes, found.rank, type(found.environment).__name__) == (4, 2, 5, kind)
    assert processes_of(4)[:3] == found[:3]
    with pytest.raises(ValueError, match=r"training.devices is 2, but 4 processes were started on this machine"):
        processes_of(2)


def test_what_processes_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least the number of processes, 3; got 2"):
        fit(config("supcon", batch_size=2, devices=3), mixed(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="0 normalises over the batch, of which each of 2 processes sees a part"):
        check_shares(processes_of(2), config().training, model)
