"""Evidence runs take the same steps as ``fit``, and stored runs are repeated only if their settings have changed."""

import json

import pytest

from bench import mdm_evidence
from bench.factorcl_terms import DATA, MODELS, SPACE, base, variants
from bench.kept import Kept, summarised
from bench.plain import train
from bench.systems_evidence import CASES, config_of, summary
from models.training.fit import fit
from models.training.search import applicable, trials
from tests.models.helpers import assert_same_weights, config, mixed, weights


@pytest.mark.parametrize("name", ["factorcl-ssl", "cross-self"])
def test_plain_steps_give_the_weights_of_fit(name, tmp_path):
    data = mixed().choose(("frames", "vectors"))
    settings = config(name, {"training.seed": 3})
    fitted = fit(settings, data, tmp_path / "run", progress=False).model
    assert_same_weights(weights(fitted), weights(train(settings, data)))
    with pytest.raises(ValueError, match="training must have no clip"):
        train(config(name, {"training.clip": 1.0}), data)


def test_a_kept_run_is_made_again_when_its_settings_change(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"encoder": {"test": float(len(calls))}}

    path = tmp_path / "study.json"
    assert [Kept(path, "w").run("a", "0", {"x": x}, make)["encoder"]["test"] for x in ((1,), (1,), (2,))] == [1, 1, 2]
    again = Kept(path, "w")
    again.run("a", "1", {"x": (2,)}, make)
    assert summarised(again.found("a", ["0", "1", "2"])) == {"encoder test": "2.500 ± 0.707", "seeds": "2"}


@pytest.mark.parametrize("data", DATA)
def test_every_variant_and_every_trial_is_a_valid_setting(data):
    for model, changes in variants().values():
        base(model, data, 0).changed(changes)
    for model in MODELS.values():
        start = base(model, data, 0)
        for changes in trials(SPACE, 8):
            start.changed(applicable(start, changes))


@pytest.mark.parametrize("name", CASES)
def test_every_arm_and_every_trial_of_a_case_is_a_valid_setting(name):
    case = CASES[name]
    for arm, settings in case.arms.items():
        of = case.arms[settings.follows or arm]
        assert len(of.rates) * len(of.trials) == 4
        for changes in of.trials:
            config_of(case, arm, 0, of.rates[0], changes)


def test_kept_runs_of_the_penalty_still_have_the_settings_of_their_arms():
    kept = json.loads(mdm_evidence.RESULTS.read_text())
    assert kept["summary"]
    for case, found in kept["summary"].items():
        for seed in mdm_evidence.SEEDS:
            for arm, settings in mdm_evidence.arms_of(case, found["weights"]).items():
                config = mdm_evidence.config_of(case, settings, seed, found["lr"])
                stored = kept["runs"][case][f"{arm}, seed {seed}"]["settings"]
                assert json.loads(json.dumps(config.to_dict())) == stored, f"{case}: {arm}"


def test_the_reference_gains_where_it_errs_less():
    def run(mae):
        return {"test": {"mae": mae}, "missing": {"audio": mae + 1}}

    found = {"MFM": [run(1.0), run(2.0)], "MFN": [run(1.5), run(2.25)]}
    mfm, mfn = summary(CASES["mfm-mmmo"], "mae", found)
    assert mfm["missing"]["audio"]["mean"] == 2.5 and "reference_gains" not in mfm
    assert mfn["reference_gains"]["mean"] == 0.375
