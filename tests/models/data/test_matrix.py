"""MulT, MFN and early fusion train on each real data set and are tested with each modality missing."""

import math

import pytest

from models.data import DataConfig, load
from models.evaluation.scores import conditions, damaged, evaluate
from models.training.fit import fit
from tests.models.helpers import config

DATA = ("digits", "utd-mhad", "mosi", "mosi-dialogue", "mmmo", "avdigits-small", "mustard")
CLASSIC = ("early-fusion", "mfn", "mult")


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


@pytest.fixture(scope="module", params=DATA)
def data(request):
    try:
        return load(DataConfig(request.param, limit=24))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("model", CLASSIC)
def test_a_data_set_trains_and_is_tested_with_each_modality_missing(model, data, tmp_path):
    strides = {"model.stride": 16} if model != "early-fusion" else {}
    settings = config(model, strides, epochs=1, batch_size=12)
    trained = fit(settings, data, tmp_path, progress=False).model.eval()
    found = evaluate(trained, data)
    missing = {name: damage for name, damage in conditions(data).items() if name.startswith("missing")}
    assert len(missing) == len(data.names) > 1
    for damage in missing.values():
        scores = damaged(trained, data, found, damage)
        assert scores.keys() == found.scores.keys()
        assert all(math.isfinite(value) for part in scores.values() for value in part.values())
