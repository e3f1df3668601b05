"""FactorCL and its baselines reproduce the numbers of the code before it was moved to models/.

golden.json was recorded with the old code in double precision. In single precision FactorCL's first steps, on a plateau
near 0, would amplify the last bit of a sum, which depends on the CPU.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.layers import dropout
from models.settings import from_dict
from models.training.fit import fit, load_data
from models.training.history import history

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
ROWS = 200


@pytest.fixture(autouse=True)
def double_precision(one_thread, monkeypatch):
    torch.set_default_dtype(torch.float64)
    # golden.json was recorded with torch's dropout.
    monkeypatch.setattr(dropout, "mask", lambda x, rate: F.dropout(torch.ones_like(x), rate))
    yield
    torch.set_default_dtype(torch.float32)


def settings(case):
    name, _, random = case.partition(", ")
    encoder = {"hidden": 32, "out_dim": 16, "layers": 1, "dropout": 0.3 if random else 0.0}
    model = {"name": name, "encoder": encoder, "head_layers": 0}
    training = {"epochs": 3, "batch_size": 24, "seed": 5, "lr": 5e-3}
    if name.startswith("factorcl"):
        model["critic_hidden"] = 32
        if random:
            model |= {"inner_steps": 2, "inner_batch": "fresh", "club_critic": "shared"}
    if random:
        training |= {"input_noise": 0.1, "weight_decay": 0.01, "augmentation": "independent"}
    return from_dict({"model": model, "data": {"name": "digits"}, "training": training})


def rows(data):
    """The first rows, in double precision."""
    modalities = tuple(dataclasses.replace(m, values=m.values[:ROWS].double()) for m in data.modalities)
    return dataclasses.replace(data, modalities=modalities, labels=data.labels[:ROWS], split=data.split[:ROWS])


@pytest.mark.parametrize("case", GOLDEN)
def test_three_epochs_are_those_of_the_code_before_the_move(case, tmp_path):
    config, want = settings(case), GOLDEN[case]
    model = fit(config, rows(load_data(config)), tmp_path, progress=False).model
    assert sum(parameter.numel() for parameter in model.parameters()) == want["parameters"]
    for column in ("loss", "valid_loss"):
        found = [value for _, value in history(tmp_path, column)]
        assert found == pytest.approx(want[column], rel=1e-6, abs=1e-9)
    flat = torch.cat([value.flatten() for value in model.state_dict().values()])
    assert flat.norm().item() == pytest.approx(want["norm"], rel=1e-7)
    assert (flat @ torch.cos(torch.arange(len(flat), dtype=torch.float64))).item() == pytest.approx(
        want["wave"], abs=1e-5
    )
