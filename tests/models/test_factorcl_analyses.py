"""FactorCL's studies of its estimators: their data has the stated information; each writes a JSON file and a figure."""

import json
import math

import pytest
import torch

import mi_kernels as mk
from models.__main__ import main
from models.analyses import ANALYSES
from models.factorcl import probe
from models.factorcl.analyses import TRUE_CONDITIONAL, correlated, jeffreys, linear_given


def generator():
    return torch.Generator().manual_seed(0)


def test_correlated_gaussians_have_the_information_asked_for():
    x, y = correlated(4.0, 20, 100_000, generator())
    rho = (x * y).mean(0) / (x.std(0) * y.std(0))
    assert -0.5 * torch.log1p(-rho.square()).sum().item() == pytest.approx(4.0, rel=0.02)


class Oracle(mk.critics.InnerProductCritic):
    """The log density ratio of ``correlated`` up to terms of x alone and of y alone, which cancel in NCE-CLUB."""

    def __init__(self, nats, dim):
        super().__init__()
        self.rho = math.sqrt(1 - math.exp(-2 * nats / dim))

    def features(self, x, y):
        return x, y, self.rho / (1 - self.rho**2)


@pytest.mark.parametrize("nats", [2.0, 4.0])
def test_nce_club_at_the_oracle_is_the_jeffreys_divergence(nats):
    rows = 20_000
    x, y = correlated(nats, 20, rows, generator())
    found = mk.NCECLUB(Oracle(nats, 20))(x, y).item()
    assert found == pytest.approx(jeffreys(nats, 20), rel=0.05)
    assert jeffreys(2.0, 20) == pytest.approx(4.43, abs=0.01)


def test_the_conditional_data_has_its_information():
    x, y, z = linear_given(200_000, 3, generator())
    rest = y - z[:, :1]
    rho = torch.corrcoef(torch.cat([x, rest], 1).T)[0, 1].item()
    assert -0.5 * math.log1p(-rho * rho) == pytest.approx(TRUE_CONDITIONAL, rel=0.02)


@pytest.mark.parametrize("name", ["factorcl-gaussian", "factorcl-cmi"])
def test_an_analysis_writes_its_json_and_its_figure(name, tmp_path, capsys):
    assert name in ANALYSES
    assert main(["analyse", name, "--out", str(tmp_path), "--quick"]) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    rows = found.get("levels") or found["rows"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (tmp_path / f"{name}.svg").stat().st_size > 1000
    assert "truth" in capsys.readouterr().out


def test_the_probe_of_every_representation_writes_its_json_and_its_figure(tmp_path, capsys):
    assert main(["analyse", "factorcl-information", "--out", str(tmp_path), "--quick"]) == 0
    rows = json.loads((tmp_path / "factorcl-information.json").read_text())["rows"]
    assert [row["representation"] for row in rows] == ["Z1", "Z2", "U1", "U2"]
    assert all(math.isfinite(row[latent]) for row in rows for latent in ("w1", "w2", "shared"))
    assert (tmp_path / "factorcl-information.svg").stat().st_size > 1000
    assert "FactorCL-SSL, unique terms" in capsys.readouterr().out


def test_an_unknown_analysis_is_named(capsys):
    assert main(["analyse", "factorcl-nothing"]) == 2
    assert "factorcl-gaussian" in capsys.readouterr().err


def test_the_probe_compares_with_the_latents_that_the_views_are_mixed_from():
    data, hidden = probe._problem(400)
    for view, own in (("x1", "w1"), ("x2", "w2")):
        mixed = torch.cat([hidden["shared"], hidden[own], torch.ones(400, 1)], 1).double()
        values = data[view].values.double()
        fitted = mixed @ torch.linalg.lstsq(mixed, values).solution
        assert (fitted - values).abs().max() < 1e-4
        other = hidden["w2" if own == "w1" else "w1"].double()
        left = values - other @ torch.linalg.lstsq(other, values).solution
        assert left.square().mean() > 0.5 * values.square().mean()
