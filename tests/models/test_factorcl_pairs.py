"""FactorCL on more than two modalities: a sum over pairs that runs each encoder once; training and saving."""

import dataclasses

import pytest
import torch

from models.batch import Batch, Inputs
from models.factorcl import FactorCLPairs, FactorCLSSL, FactorCLSUP
from models.layers.encoders import MLPEncoder
from models.registry import build
from models.training.fit import fit, load_run
from tests.models.helpers import config, mixed
from tests.models.test_factorcl import SMALL

KINDS = [FactorCLSUP, FactorCLSSL]
DIMS = {"a": 5, "b": 4, "c": 3}
CONFIG = dataclasses.replace(SMALL, feature_dims=(6, 6))


def batch(size=10):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: {n: Inputs(torch.randn(size, d, generator=generator)) for n, d in DIMS.items()}  # noqa: E731
    return Batch(draw(), torch.randint(3, (size,), generator=generator), None, torch.arange(size), (draw(),))


def made(kind, **changes):
    torch.manual_seed(0)
    encoders = [MLPEncoder(dim, 8, 6, 0) for dim in DIMS.values()]
    return FactorCLPairs(kind, tuple(DIMS), encoders, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_sum_over_pairs_with_shared_encoders(kind):
    model, data = made(kind), batch()
    found = model.loss(data)
    wanted = 0
    for (i, j), pair in zip(model.places, model.pairs, strict=True):
        apart = kind(model.encoders[i], model.encoders[j], CONFIG)
        apart.load_state_dict(pair.state_dict(), strict=False)
        names = list(DIMS)[i], list(DIMS)[j]
        part = data._replace(
            inputs={n: data.inputs[n] for n in names}, views=({n: data.views[0][n] for n in names},)
        )
        loss = apart.loss(part)
        wanted = wanted + loss.total
        for term, value in loss.terms.items():
            torch.testing.assert_close(found.terms[f"{names[0]}+{names[1]}/{term}"], value)
    torch.testing.assert_close(found.total, wanted)
    assert len(found.terms) == 18


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_runs_once_and_the_inner_phase_steps_club_critics_alone(kind):
    model, data = made(kind), batch()
    calls = []
    for encoder in model.encoders:
        encoder.register_forward_hook(lambda *_: calls.append(1))
    main, club = model.phases()
    main.loss(data)
    assert len(calls) == 3
    phi = {id(p) for pair in model.pairs for p in pair.inner_parameters()}
    assert {id(p) for p in club.parameters} == phi
    assert {id(p) for p in main.parameters} == {id(p) for p in model.parameters()} - phi
    club.loss(club.fixed(data)).total.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == phi


def test_representations_have_a_unique_part_per_modality():
    parts = made(FactorCLSUP).representations(batch())
    assert list(parts) == ["encoder", "full", "S", "U1", "U2", "U3"]
    assert parts["encoder"].shape == (10, 18) and parts["S"].shape == (10, 6 * 12) and parts["U2"].shape == (10, 36)


@pytest.mark.parametrize("name", ["factorcl-sup", "factorcl-ssl"])
def test_three_modalities_train_from_the_command_and_come_back(name, tmp_path):
    data = mixed()
    settings = config(name, {"training.augmentation": "mixing", "model.critic": "cosine"}, epochs=1)
    module = fit(settings, data, tmp_path / "run", progress=False)
    _, loaded = load_run(tmp_path / "run", data)
    rows = data.rows("test")
    for part, values in module.model.eval().representations(data.batch(rows)).items():
        torch.testing.assert_close(loaded.representations(data.batch(rows))[part], values)
    assert isinstance(build(name, settings.model, data, 0), FactorCLPairs)
