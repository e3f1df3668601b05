"""Several processes: every model's curves and weights are those of one process on the same batches."""

import dataclasses
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from models.batch import Batch, Inputs
from models.registry import MODELS, build
from models.shares import Share, average_gradients, by_rows, own_rows, sharing
from models.training.checkpoint import LAST, WEIGHTS, load_weights, read_checkpoint
from models.training.distributed import STARTED, launch, processes_of
from models.training.fit import fit
from models.training.history import columns, history
from models.training.phases import Training
from tests.models.helpers import config, mixed

RANKS = 2
PAIR = ("frames", "vectors")
INNER = {"model.inner_batch": "fresh", "model.inner_steps": 2, "model.club_critic": "shared"}
# Every model as it is, and settings whose losses take another way.
CASES = {name: (name, {}) for name in MODELS} | {
    "factorcl-ssl, fresh": ("factorcl-ssl", INNER),
    "mfm, surrogates": ("mfm", {"model.surrogate": True}),
    "mdm, parameters": ("mdm", {"model.balance": "parameters"}),
    "mdm, wasserstein": ("mdm", {"model.measure": "wasserstein", "model.fresh": True}),
    "mdm around simclr": ("mdm", {"model.base": {"name": "simclr"}, "model.representation": "encoder"}),
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
    """Batches of 15 rows, of which few are usable: no share is like another. Without dropout, whose draws differ."""
    model, changes = CASES[case]
    found = config(model, RANDOM | changes, batch_size=15, precision="64", devices=devices)
    return found.changed({name: 0.0 for name in found.flat() if name.endswith("dropout")})


def data_of(case):
    data = mixed()
    return data.choose(PAIR) if case.startswith("factorcl") else data


def sweep(folder, devices):
    for case in CASES:
        fit(settings(case, devices), data_of(case), folder / case, progress=False)




def _many(folder):
    """In each of several processes: all cases in one group."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    sweep(folder, 1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    one, many = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("many")
    torch.set_num_threads(1)
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
