"""Interpretation with the statistics network, damaged modalities, and both analyses from the command line."""

import json
import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from models.__main__ import main
from models.batch import Target
from models.data import SPLITS, Dataset, Modality
from models.mdm import MDM, Settings
from models.mdm.interpretation import (
    area,
    average_ranks,
    deciles,
    dependency,
    disagreement,
    pointwise,
    ranking,
    spearman,
)
from models.mdm.robustness import KINDS, damaged
from models.model import Model
from models.settings import from_dict
from models.training.fit import fit
from tests.models.helpers import SMALL, mixed


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


def test_ranks_area_and_spearman_are_those_of_scipy_and_sklearn():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(6, (40,), generator=generator).double()
    b = a + torch.randint(9, (40,), generator=generator)
    assert average_ranks(a.numpy()).tolist() == rankdata(a.numpy()).tolist()
    truth = roc_auc_score([1] * 40 + [0] * 40, torch.cat([b, a]).numpy())
    assert area(b, a) == pytest.approx(truth)
    found, wanted = spearman(a, b, 4999), spearmanr(a.numpy(), b.numpy())
    assert found["rho"] == pytest.approx(wanted.statistic)
    other = torch.randn(40, generator=generator)
    found, wanted = spearman(a, other, 4999), spearmanr(a.numpy(), other.numpy())
    assert found["p"] == pytest.approx(wanted.pvalue, abs=0.03)


def test_a_constant_has_no_rank_correlation():
    found = spearman(torch.ones(9), torch.arange(9.0), 99)
    assert math.isnan(found["rho"]) and found["p"] == 1.0
    with pytest.raises(ValueError, match="a and b must be"):
        spearman(torch.ones(3), torch.ones(4))


def test_deciles_and_rankings_go_by_the_score():
    data = mixed(missing=False)
    score, rows = torch.arange(90.0).flip(0), torch.arange(90)
    parts = deciles(score, {"twice": 2 * score})
    assert [part["rows"] for part in parts] == [9] * 10
    assert parts[0]["score"] == 4 and parts[-1]["score"] == 85 and parts[-1]["twice"] == 170
    found = ranking(data, rows, {"score": score}, "score", 3)
    assert [row["row"] for row in found["high"]] == [0, 1, 2] and [row["row"] for row in found["low"]] == [89, 88, 87]


def test_disagreement_is_a_distance_between_predictions():
    sure, unsure = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.full((2, 2), 0.5)
    assert disagreement([sure, sure.flip(0)], True).tolist() == [1.0, 1.0]
    assert disagreement([sure, unsure, unsure], True).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert disagreement([torch.tensor([[1.0]]), torch.tensor([[3.0]])], False).tolist() == [2.0]


class Sum(Model):
    """A base model whose representation is the concatenation of two vectors of one feature."""

    def representations(self, batch):
        return {"fused": torch.cat([x.values for x in batch.inputs.values()], 1)}


def test_the_score_of_a_row_is_its_log_density_ratio_under_the_critic_of_a_known_distribution():
    """For correlated normals and T the log density ratio, s = T - log mean exp T' tends to T; true pairs score higher
    than shuffled ones."""
    rho, rows = 0.8, 8000
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, rows, 1, generator=generator)
    parts = (Modality("x", x), Modality("y", rho * x + math.sqrt(1 - rho**2) * e))
    data = Dataset("normal", parts, None, Target.none(), torch.zeros(rows, dtype=torch.int64))
    model = MDM(Sum(), data, Settings())

    def ratio(z):
        a, b = z.unbind(1)
        return -0.5 * (math.log(1 - rho**2) + (rho**2 * (a * a + b * b) - 2 * rho * a * b) / (1 - rho**2))

    model.scores = lambda z: ratio(z)
    state = model.measure.draws.get_extra_state()
    joint, product = dependency(model, data, torch.arange(rows), 5)
    assert torch.equal(model.measure.draws.get_extra_state(), state)
    assert joint.shape == (rows,) and product.shape == (5 * rows,)
    truth = -0.5 * math.log(1 - rho**2)
    assert pointwise(joint, product).mean().item() == pytest.approx(truth, abs=0.07)
    assert area(joint, product) > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_damage_reaches_one_modality_of_one_split_and_no_row_keeps_its_own(kind):
    data = mixed(missing=False)
    test, others = data.split == SPLITS["test"], data.split != SPLITS["test"]
    for name in data.names:
        found = damaged(data, name, kind)
        for modality in data.modalities:
            before, after = (m.take(torch.arange(90)) for m in (modality, found[modality.name]))
            same = (before.values == after.values).flatten(1).all(1)
            if modality.name != name:
                assert same.all()
                continue
            assert same[others].all() and (modality.is_tokens or not same[test].any())
            if kind != "swap" and before.lengths is not None:
                assert torch.equal(before.lengths, after.lengths)
    train = data["frames"].values[others[data["frames"].rows_of_frames()]]
    filled = damaged(data, "frames", kind)["frames"].take(data.rows("test")).values[:, 0]
    if kind == "zeros":
        assert not filled.any()
    if kind == "mean":
        own = data["frames"].rows_of_frames()
        mean = data["frames"].values[(data.split == SPLITS["train"])[own]].mean(0)
        torch.testing.assert_close(filled, mean.expand_as(filled), rtol=1e-4, atol=1e-5)
        assert len(train)
    # Standardisation uses the statistics of the training rows, which are not damaged.
    rows = data.rows("train")
    found, wanted = (d.standardised()["vectors"].values[rows] for d in (damaged(data, "vectors", kind), data))
    torch.testing.assert_close(found, wanted)


def test_damage_that_cannot_be_done_is_named():
    data = mixed(missing=False)
    for arguments, message in [
        (("frames", "noise"), "kind must be one of zeros, mean, swap"),
        (("sound", "swap"), "name must be one of frames, tokens, vectors"),
        (("frames", "zeros", "train"), "split must not be train"),
    ]:
        with pytest.raises(ValueError, match=message):
            damaged(data, *arguments)


def test_a_critic_is_asked_of_whole_rows_alone():
    data = mixed()
    tree = {"model": {"name": "mdm", "base": {"name": "mfn", **SMALL["mfn"]}}}
    config = from_dict(tree)
    from models.registry import build

    model = build("mdm", config.model, data, 0)
    with pytest.raises(ValueError, match="every modality"):
        dependency(model, data, torch.arange(90))
    with pytest.raises(ValueError, match="at least 3, got 2"):
        dependency(model, data, torch.tensor([1, 2]))


def own_run(tmp_path, data, monkeypatch):
    tree = {
        "model": {"name": "mdm", "base": {"name": "late-fusion", **SMALL["late-fusion"]}, "hidden": [8]},
        "data": {"name": "synthetic"},
        "training": {"epochs": 1, "batch_size": 16},
    }
    for place in ("models.mdm.analyses.load_data", "models.evaluation.runs.load_data"):
        monkeypatch.setattr(place, lambda config: data.choose(config.data.modalities or data.names))
    monkeypatch.setattr(
        "models.mdm.analyses.load", lambda config, seed: data.choose(config.modalities or data.names)
    )
    fit(from_dict(tree), data, tmp_path, progress=False)


@pytest.mark.parametrize("target", ["classes", "regression"])
def test_the_critic_of_a_run_is_read_from_the_command_line(target, tmp_path, monkeypatch, capsys):
    own_run(tmp_path, mixed(target), monkeypatch)
    assert main(["analyse", "mdm-critic", "--out", str(tmp_path), "--quick"]) == 0
    found = json.loads((tmp_path / "mdm-critic.json").read_text())
    assert 0 <= found["auc"]["test"] <= 1 and found["test_groups_in_train"] is None
    assert set(found["spearman"]) == {"disagreement", "error"} and len(found["deciles"]) == 10
    assert sum(part["rows"] for part in found["deciles"]) == found["test_rows"]
    assert (tmp_path / "mdm-critic.svg").stat().st_size and "AUC" in capsys.readouterr().out


def test_lost_modalities_stand_beside_the_best_single_one(tmp_path, monkeypatch, capsys):
    own_run(tmp_path, mixed(), monkeypatch)
    assert main(["analyse", "mdm-robustness", "--out", str(tmp_path), "--quick"]) == 0
    rows = json.loads((tmp_path / "mdm-robustness.json").read_text())["rows"]
    assert [row["arm"] for row in rows[:-1]] == ["weight 0", "kl", "f", "wasserstein"]
    assert rows[-1]["arm"] in ("frames alone", "tokens alone", "vectors alone") and "clean" in rows[-1]
    assert {f"{name} {kind}" for name in ("frames", "tokens", "vectors") for kind in KINDS} < set(rows[0])
    assert (tmp_path / "mdm-robustness.svg").is_file() and "weight 0" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("tmp")]


def test_an_analysis_of_another_models_run_is_refused(tmp_path, capsys):
    from_dict({"model": {"name": "mfn"}, "data": {"name": "digits"}}).save(tmp_path)
    assert main(["analyse", "mdm-robustness", "--out", str(tmp_path)]) == 2
    assert "reads runs of mdm" in capsys.readouterr().err
