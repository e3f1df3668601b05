"""Changes one setting of FactorCL at a time and measures validation and test accuracy of linear probes.

`python -m bench.factorcl_evidence DATA [--seeds 5] [--out FOLDER] [--only NAME,...]` trains every variant of VARIANTS
with the settings of its configuration for DATA, and writes bench/results/factorcl_evidence_DATA.json after every seed.
It continues an existing file of the same commit. Choose between variants only by the "valid" columns; test rows are
scored only for the table. DATA is utd-mhad, synthetic, synthetic-gaussian (the last two with a label from unique
latents alone) or two-digit-small.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from models import settings
from models.data.dataset import Dataset
from models.evaluation.metrics import primary
from models.evaluation.probes import input_features, probe
from models.evaluation.scores import evaluate
from models.provenance import commit, describe
from models.registry import build
from models.settings import RunConfig
from models.training.fit import fit, load_data

from . import machine
from .kept import mean_and_deviation

RESULTS = Path(__file__).parent / "results"
UNIQUE = {"data.target": "unique"}
DATA: dict[str, dict[str, Any]] = {
    "utd-mhad": {},
    "synthetic": UNIQUE,
    "synthetic-gaussian": UNIQUE,
    "two-digit-small": {},
}
CONCAT = {"model.critic": "concat", "model.club_floor": None, "model.club_weight": 1.0, "model.objective": "all"}
COSINE = CONCAT | {"model.critic": "cosine"}
CHANGES: dict[str, dict[str, Any]] = {
    "public code": CONCAT | {"model.preset": "public-code"},
    "concat": CONCAT,
    "concat, floor 0": CONCAT | {"model.club_floor": 0.0},
    "concat, no upper bounds": CONCAT | {"model.objective": "no-upper-bounds"},
    "concat, own terms alone": CONCAT | {"model.objective": "own-terms"},
    "cosine": COSINE,
    "cosine, floor 0": COSINE | {"model.club_floor": 0.0},
    "cosine, weight 0.1": COSINE | {"model.club_weight": 0.1},
    "cosine, no upper bounds": COSINE | {"model.objective": "no-upper-bounds"},
    "cosine, own terms alone": COSINE | {"model.objective": "own-terms"},
}
ONLY_SSL: dict[str, dict[str, Any]] = {
    "cosine, floor 0, independent views": COSINE
    | {"model.club_floor": 0.0, "training.augmentation": "independent"},
    "cosine, floor 0, 3 inner steps": COSINE | {"model.club_floor": 0.0, "model.inner_steps": 3},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SimCLR": ("simclr", {}),
    "SupCon": ("supcon", {}),
    "Cross+Self": ("cross-self", {}),
    **{f"SUP, {name}": ("factorcl-sup", changes) for name, changes in CHANGES.items()},
    **{f"SSL, {name}": ("factorcl-ssl", changes) for name, changes in (CHANGES | ONLY_SSL).items()},
}


def base(model: str, data: str) -> RunConfig:
    """The model's configuration for the data; for data without one, that of "synthetic"."""
    known = f"{model}/{data}" in settings.known_configs()
    config = settings.starting_point(model, data if known else "synthetic")
    return config.changed({"data.name": data} | DATA[data])


def scored(config: RunConfig, data: Dataset) -> dict[str, dict[str, float]]:
    """{representation: {"valid", "test"}} of a trained model, and of the encoders before training."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = fit(config, data, Path(folder), progress=False).model.eval()
    seconds = time.perf_counter() - start
    fresh = build(config.name, config.model, data, config.seed).eval()
    metric = primary(data.target)
    found = evaluate(model, data, only=("encoder", "full")).scores
    found["untrained"] = evaluate(fresh, data, only=("encoder",)).scores["encoder"]
    parts = {name: {"valid": s["valid"], "test": s["test"][metric]} for name, s in found.items()}
    return parts | {"fit": {"seconds": round(seconds, 1)}}


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """{variant: {"encoder test": "mean ± deviation", ...}}."""
    table: dict[str, dict[str, str]] = {}
    for name, seeds in runs.items():
        parts = [part for part in next(iter(seeds.values())) if part != "fit"] if seeds else []
        table[name] = {
            f"{part} {split}": mean_and_deviation([found[part][split] for found in seeds.values()])
            for part in parts
            for split in ("valid", "test")
        } | {"seeds": str(len(seeds))}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=tuple(DATA))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="variants that start with one of these, separated by semicolons")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / f"factorcl_evidence_{args.data.replace('-', '_')}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    runs: dict[str, dict[str, Any]] = kept["runs"] if kept.get("machine", {}).get("commit") == commit() else {}
    starts = tuple(args.only.split(";")) if args.only else ("",)
    chosen = {name: v for name, v in VARIANTS.items() if name.startswith(starts)}
    for seed in range(args.seeds):
        for name, (model, changes) in chosen.items():
            config = base(model, args.data).changed(changes | {"training.seed": seed, "training.threads": 1})
            if str(seed) not in runs.setdefault(name, {}):
                runs[name][str(seed)] = scored(config, load_data(config))
                print(seed, name, runs[name][str(seed)], flush=True)
        data = load_data(base("simclr", args.data).changed({"training.seed": seed}))
        if str(seed) not in runs.setdefault("linear", {}):
            found = probe(input_features(data)["input"], data)
            value = {"valid": found["valid"], "test": found["test"][primary(data.target)]}
            runs["linear"][str(seed)] = {"input": value}
        content = {
            "what": f"{primary(data.target)} of linear probes on {args.data}; untrained: the encoders before training",
            "machine": describe(),
            "changes": {name: {"model": m, **c, **DATA[args.data]} for name, (m, c) in chosen.items()},
            "summary": summary(runs),
            "runs": runs,
        }
        machine.save(path, content)
    for name, row in summary(runs).items():
        print(name, row)


if __name__ == "__main__":
    main()
