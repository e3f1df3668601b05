"""What rows without a label are worth to MIRD: UTD-MHAD with 10, 30 and 100 % of the training labels, five seeds.

    python -m bench.mird_labels [--json bench/results/mird_utd_mhad_labels.json]

"mird, unlabelled" trains on all rows, of which the labelled ones enter the prediction; "mird, labelled" on the labelled
rows alone; "mird, prediction" has z_S and the head alone, on the labelled rows; MulT and MISA see the labelled rows.
Every arm makes about as many steps, and keeps the weights of its best validation loss. Settings are chosen once per
arm, with 30 % of the labels: the best of four trials on the validation rows of a seed that is not reported. "linear" is
a probe on the pooled inputs. Writes the file after every run and goes on from it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from bench.kept import Kept
from bench.trained import moments, paired, prepare, trained
from models.data.labels import with_share_of_labels
from models.evaluation.probes import input_features, probe
from models.settings import RunConfig, from_dict
from models.training.fit import load_data

RESULTS = Path(__file__).parent / "results" / "mird_utd_mhad_labels.json"
SHARES = (0.1, 0.3, 1.0)
SEEDS, SEARCH_SEED, SEARCH_SHARE = (0, 1, 2, 3, 4), 1000, 0.3
STEPS, ROWS = 300, 323
BATCH = {0.1: 16, 0.3: 32, 1.0: 64}
SIZES = {"dim": 48, "heads": 4, "layers": 1, "embed_dropout": 0.0, "input_dropout": [0.0]}
MIRD = {"name": "mird", "agnostic": "transformer", "sizes": SIZES, "stride": 12, "dim": 32, "dropout": 0.2}
LIGHT = {"loss": "weighted", "reconstruction": {"skeleton": 0.1, "inertial": 0.1}}
# The four trials of an arm: two step sizes, and two values of what matters most to it.
RATES = (1e-3, 3e-3)
ARMS: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "mird, unlabelled": (MIRD | {"ladder": "unlabelled", "mi_weight": 0.1}, ({}, LIGHT)),
    "mird, labelled": (MIRD | {"ladder": "mi", "mi_weight": 0.1}, ({}, LIGHT)),
    "mird, prediction": (MIRD | {"ladder": "agnostic"}, ({}, {"dropout": 0.5})),
    "mult": ({"name": "mult", "stride": 12, "sizes": {"dim": 32, "heads": 4, "layers": 1}}, ({}, {"stride": 6})),
    "misa": ({"name": "misa", "stride": 12}, ({}, {"dropout": 0.2})),
}


def config_of(arm: str, share: float, seed: int, lr: float, changes: dict[str, Any]) -> RunConfig:
    everything = arm == "mird, unlabelled"
    batch = 64 if everything else BATCH[share]
    epochs = round(STEPS / ((ROWS if everything else int(share * ROWS)) // batch))
    data = {"name": "utd-mhad", "modalities": ["skeleton", "inertial"], "labels": share, "unlabelled": everything}
    training = {"epochs": epochs, "batch_size": batch, "lr": lr, "clip": 1.0, "select": "best", "seed": seed}
    model = {**ARMS[arm][0], **changes}
    return from_dict({"model": model, "data": data, "training": training | {"threads": 1}})


def measured(config: RunConfig) -> dict[str, Any]:
    return trained(config, load_data(config))[1]


def chosen(arm: str, kept: Kept) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """The best trial on validation rows, the first of equals, and all."""
    tried = []
    for lr in RATES:
        for changes in ARMS[arm][1]:
            config = config_of(arm, SEARCH_SHARE, SEARCH_SEED, lr, changes)
            found = kept.run(arm, f"search, {lr:g} {changes}", config.to_dict(), partial(measured, config))
            tried.append({"lr": lr, "changes": changes, "valid": found["valid"]["accuracy"]})
    best = max(tried, key=lambda trial: trial["valid"])
    return best["lr"], best["changes"], tried


def linear(share: float, seed: int) -> float:
    """Test accuracy of a probe on the pooled inputs, fitted on the labelled rows."""
    full = load_data(from_dict({"model": {"name": "misa"}, "data": {"name": "utd-mhad"}})).choose(
        ("skeleton", "inertial")
    )
    data = with_share_of_labels(full, share, seed) if share < 1 else full
    return float(probe(input_features(data)["input"], data)["test"]["accuracy"])


def summary(found: dict[str, dict[float, list[float]]]) -> list[dict[str, Any]]:
    """Mean and deviation by arm and share, and the gain that unlabelled rows make, paired by seed."""
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        rows += [{"labels": share, "arm": arm, **moments(by[share])} for arm, by in found.items() if by.get(share)]
        for other in ("mird, labelled", "mird, prediction", "linear"):
            pairs = zip(found["mird, unlabelled"].get(share, []), found[other].get(share, []), strict=False)
            gains = [a - b for a, b in pairs]
            if len(gains) > 1:
                what = f"mird, unlabelled minus {other}"
                rows.append({"labels": share, "arm": what, **moments(gains), **paired(gains)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    prepare()
    kept = Kept(given.json, " ".join((__doc__ or "").split("\n\n")[2].split()))
    choices = {arm: chosen(arm, kept) for arm in ARMS}
    found: dict[str, dict[float, list[float]]] = {arm: {share: [] for share in SHARES} for arm in (*ARMS, "linear")}
    for seed in SEEDS:
        for share in SHARES:
            for arm, (lr, changes, _) in choices.items():
                config = config_of(arm, share, seed, lr, changes)
                key = f"{share:g} of the labels, seed {seed}"
                run = kept.run(arm, key, config.to_dict(), partial(measured, config))
                found[arm][share].append(run["test"]["accuracy"])
            found["linear"][share].append(linear(share, seed))
        kept.content["search"] = {arm: tried for arm, (_, _, tried) in choices.items()}
        kept.content["summary"] = summary(found)
        kept.write()
    for row in kept.content["summary"]:
        print(row)


if __name__ == "__main__":
    main()
