"""Which term of FactorCL without labels loses unique information, and whether a search of settings helps.

    python -m bench.factorcl_terms terms  DATA [--seeds 5]
    python -m bench.factorcl_terms search DATA [--seeds 5] [--trials 8]

"terms" removes one term at a time, trains about 400 steps a run, and probes encoders and factors. "search" gives every
model equally many trials on the validation rows of a seed that is not reported, then trains the best of each on the
reported seeds. Both write bench/results/factorcl_STUDY_DATA.json after every run and go on from it. Test rows choose
nothing. DATA is synthetic, synthetic-gaussian (labels from unique latents alone), two-digit-small or two-digit (MNIST).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from models import settings
from models.compare import SEARCH_SEED
from models.data.dataset import Dataset
from models.evaluation.metrics import primary
from models.evaluation.probes import input_features, probe
from models.evaluation.scores import evaluate
from models.factorcl.config import TERMS
from models.factorcl.probe import COSINE, UNIQUE_TERMS
from models.registry import build
from models.settings import RunConfig
from models.training.fit import load_data
from models.training.search import applicable, trials

from .kept import Kept, summarised
from .plain import train

RESULTS = Path(__file__).parent / "results"
UNIQUE = {"data.target": "unique"}
SIZES = {"hidden": 256, "out_dim": 64, "layers": 1}
SMALL = {f"model.encoder.{name}": size for name, size in SIZES.items()} | {"model.critic_hidden": 128}
VECTORS = SMALL | {"training.batch_size": 64, "training.lr": 5e-4, "training.epochs": 11}  # 407 steps of 2,400 rows
DATA: dict[str, dict[str, Any]] = {
    "synthetic": UNIQUE | VECTORS,
    "synthetic-gaussian": UNIQUE | VECTORS,
    "two-digit-small": {"training.epochs": 25, "model.critic_hidden": 128},
    "two-digit": {"training.epochs": 15, "model.critic_hidden": 128},
}
FACTOR = COSINE | {"model.heads": "factor"}
UNIQUE_ONLY = COSINE | UNIQUE_TERMS
FORMS: dict[str, dict[str, Any]] = {"cosine": COSINE, "factor heads": FACTOR, "concat": {"model.critic": "concat"}}
SSL = "factorcl-ssl"
BASELINES = {"SimCLR": "simclr", "Cross+Self": "cross-self"}
MODELS = BASELINES | {"FactorCL-SSL": SSL, "SupCon": "supcon", "FactorCL-SUP": "factorcl-sup"}
# A setting that a model does not have is left out, so that every model has the same number of trials.
SPACE: dict[str, tuple[Any, ...]] = {
    "training.lr": (5e-4, 1e-3, 2e-3),
    "training.augmentation": ("unique", "independent"),
    "model.temperature": (0.05, 0.1, 0.3, 0.5),
    "model.critic": ("cosine", "concat"),
    "model.club_floor": (None, 0.0),
    "model.club_weight": (1.0, 0.1),
    "model.heads": ("factor", "term"),
    "model.without": ((), tuple(UNIQUE_ONLY["model.without"])),
}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Of the study "terms": {name: (model, changes)}."""
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (model, {}) for name, model in BASELINES.items()}
    found["unique terms, factor heads"] = (SSL, UNIQUE_ONLY)
    found["unique terms, factor heads, no floor, weight 0.3"] = (
        SSL,
        UNIQUE_ONLY | {"model.club_floor": None, "model.club_weight": 0.3},
    )
    found["view terms alone"] = (SSL, COSINE | {"model.objective": "own-terms"})
    for form, changes in FORMS.items():
        found[form] = (SSL, changes)
        for term in TERMS:
            found[f"{form}, without {term}"] = (SSL, changes | {"model.without": [term]})
    concat = FORMS["concat"]
    found["concat, unique terms, factor heads"] = (SSL, concat | UNIQUE_TERMS)
    found["concat, view terms alone"] = (SSL, concat | {"model.objective": "own-terms"})
    found["concat, without upper bounds"] = (SSL, concat | {"model.objective": "no-upper-bounds"})
    return found


def base(model: str, data: str, seed: int) -> RunConfig:
    """The same sizes and steps for every model on the data."""
    config = settings.starting_point(model, data).changed({"data.name": data})
    config = config.changed(applicable(config, DATA[data]))
    return config.changed({"training.seed": seed, "training.threads": 1})


def scored(config: RunConfig, data: Dataset, *, test: bool = True) -> dict[str, dict[str, float]]:
    """{representation: {"valid", "test"}} of a trained model, and of its encoders before training."""
    start = time.perf_counter()
    model = train(config, data)
    seconds = round(time.perf_counter() - start, 1)
    metric, splits = primary(data.target), ("valid", "test") if test else ("valid",)

    def values(found: Mapping[str, Any]) -> dict[str, float]:
        return {split: found["valid"] if split == "valid" else found["test"][metric] for split in splits}

    scores = evaluate(model, data, only=("encoder", "full")).scores
    parts = {name: values(found) for name, found in scores.items()}
    if test:
        fresh = build(config.name, config.model, data, config.seed).eval()
        parts["untrained"] = values(evaluate(fresh, data, only=("encoder",)).scores["encoder"])
    return parts | {"fit": {"seconds": seconds}}


def linear(data: Dataset) -> dict[str, dict[str, float]]:
    found = probe(input_features(data)["input"], data)
    return {"input": {"valid": found["valid"], "test": found["test"][primary(data.target)]}}


def study(
    kept: Kept, data: str, chosen: Mapping[str, tuple[str, dict[str, Any]]], seeds: Iterable[int], names: Iterable[str]
) -> None:
    """Every chosen variant with every seed, seed by seed, and the linear model of the inputs. The summary has all
    ``names`` that were ever run with these seeds."""
    seeds = list(seeds)
    for seed in seeds:
        for name, (model, changes) in chosen.items():
            config = base(model, data, seed).changed(changes)
            kept.run(name, str(seed), config.to_dict(), lambda c=config: scored(c, load_data(c)))  # type: ignore[misc]
        config = base("simclr", data, seed)
        kept.run("linear", str(seed), config.to_dict()["data"], lambda c=config: linear(load_data(c)))  # type: ignore[misc]
    for name in ("linear", *names):
        found = kept.found(name, map(str, seeds))
        if len(found) == len(seeds):
            kept.content["summary"][name] = summarised(found)
    kept.write()


def search(kept: Kept, data: str, number: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The best of ``number`` settings of every model on validation rows: of the encoders or the factors, as they
    are better there."""
    chosen, drawn = {}, trials(SPACE, number)
    for name, model in MODELS.items():
        start, values = base(model, data, SEARCH_SEED), []
        for index, changes in enumerate(drawn):
            config = start.changed(applicable(start, changes))
            run = lambda c=config: scored(c, load_data(c), test=False)  # noqa: E731
            found = kept.run(f"{name}, search", str(index), config.to_dict(), run)
            values.append(max(part["valid"] for part in found.values() if "valid" in part))
        best = max(range(number), key=lambda index: values[index])
        chosen[name] = (model, applicable(start, drawn[best]))
        kept.content.setdefault("chosen", {})[name] = chosen[name][1] | {"valid": values[best]}
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("terms", "search"))
    parser.add_argument("data", choices=tuple(DATA))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--only", default="", help="variants that start with one of these, separated by semicolons")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / f"factorcl_{args.study}_{args.data.replace('-', '_')}.json"
    kept = Kept(path, f"accuracy of linear probes on {args.data}; untrained: the encoders before training")
    chosen = variants() if args.study == "terms" else search(kept, args.data, args.trials)
    starts = tuple(args.only.split(";")) if args.only else ("",)
    study(kept, args.data, {n: v for n, v in chosen.items() if n.startswith(starts)}, range(args.seeds), chosen)
    for name, row in kept.content["summary"].items():
        print(name, row)


if __name__ == "__main__":
    main()
