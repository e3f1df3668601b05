"""`Named` holds modules under any name, also those that nn.ModuleDict rejects; ordinary names are kept in state
dicts."""

import pytest
import torch
from torch import nn

from models.batch import Target
from models.data import Dataset, Modality
from models.layers.named import Named
from models.registry import build
from tests.models.helpers import config

ODD = ["keys", "audio.v2", "training", "_modules", "forward", "a%2Eb", "per cent%", "", "items%"]


def test_any_names_are_kept_apart_and_come_back():
    modules = {name: nn.Linear(1, 1) for name in [*ODD, "plain"]}
    found = Named(modules)
    assert list(found) == list(found.keys()) == list(modules) and len(found) == len(modules)
    assert all(found[name] is module and name in found for name, module in modules.items())
    assert dict(found.items()) == modules and "absent" not in found
    assert "plain.weight" in found.state_dict() and len(found.state_dict()) == 2 * len(modules)


@pytest.mark.parametrize("names", [("keys", "audio.v2"), ("values", "pop")])
def test_mfm_trains_on_modalities_of_such_names(names):
    rows = torch.arange(20)
    modalities = tuple(Modality(name, torch.randn(20, 3)) for name in names)
    data = Dataset("odd", modalities, rows % 2, Target.classes(2), torch.zeros(20, dtype=torch.int64))
    settings = config("mfm", {"model.surrogate": True})
    model = build("mfm", settings.model, data, 0)
    model.loss(data.batch(rows)).total.backward()
    assert set(model.representations(data.batch(rows))) == {"F_y", *(f"F_{name}" for name in names)}
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
