"""The probe of FactorCL's Table 1: how much of each latent of the synthetic data a representation holds, in nats."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import mi_kernels as mk
from models import settings
from models.data.dataset import Dataset
from models.data.sources.synthetic import LABEL_DIMS, generate, latents
from models.evaluation.runs import write_json
from models.model import Model
from models.provenance import describe
from models.registry import build
from models.settings import RunConfig
from models.training.fit import fit

matplotlib.use("Agg")

COSINE = {"model.critic": "cosine", "model.club_floor": 0.0}
# The upper bound of I(X1;X2) and the two view terms, on one head per factor: what docs/factorcl.md recommends.
UNIQUE_TERMS = {"model.heads": "factor", "model.without": ["infonce_x1x2", "infonce_x1x2_cond", "club_x1x2_cond"]}
# {row: (model, changes of its settings; None: as initialised)}
PROBED: dict[str, tuple[str, dict[str, Any] | None]] = {
    "untrained": ("simclr", None),
    "SimCLR": ("simclr", {}),
    "Cross+Self": ("cross-self", {}),
    "SupCon": ("supcon", {}),
    "FactorCL-SUP": ("factorcl-sup", COSINE),
    "FactorCL-SSL": ("factorcl-ssl", COSINE),
    "FactorCL-SSL, concat critics": ("factorcl-ssl", {"model.critic": "concat", "model.critic_hidden": 128}),
    "FactorCL-SSL, unique terms": ("factorcl-ssl", COSINE | UNIQUE_TERMS),
}


def information(out: Path, quick: bool = False) -> str:
    """I(Z; w) for the encoders of every model and the factors of FactorCL, w the latents unique to the first view, to
    the second, and shared; the label depends on all of them.

    Models train on 2,400 rows for 407 steps; ``mk.estimate_mi`` sees 3,200 others, of which it keeps half from its fit:
    no value can exceed log 1600 = 7.4 nats, and w is in the views without noise, so that the truth of the views
    themselves is infinite. Compare rows with each other, not with the paper's values. quick: one model, two epochs.
    """
    rows, samples = [], 400 if quick else 5600
    data, hidden = _problem(samples)
    chosen = dict(list(PROBED.items())[-1:]) if quick else PROBED
    for label, (name, changes) in chosen.items():
        model = _trained(name, changes, data, quick)
        seen = data.batch(torch.arange(samples)[data.split != 0])
        for part, z in _parts(model, seen).items():
            values = {w: _estimate(z, latent[data.split != 0], quick) for w, latent in hidden.items()}
            rows.append({"model": label, "representation": part, **values})
    content = {"machine": describe(), "ceiling": math.log(int((data.split != 0).sum()) // 2), "rows": rows}
    write_json(out / "factorcl-information.json", content)
    _figure(rows, list(hidden)).savefig(out / "factorcl-information.svg", bbox_inches="tight")
    lines = [f"{'model':28} {'Z':9}" + "".join(f"{w:>10}" for w in hidden)]
    for row in rows:
        lines.append(f"{row['model']:28} {row['representation']:9}" + "".join(f"{row[w]:10.2f}" for w in hidden))
    return "\n".join(lines)


def _problem(samples: int) -> tuple[Dataset, dict[str, Tensor]]:
    """Rows of which three in seven train, with a standardised copy of the views, and their latents by name."""
    drawn = generate(samples, seed=0, label_dims=LABEL_DIMS["all"], mixing="gaussian")
    split = torch.ones(samples, dtype=torch.int64)
    split[: 3 * samples // 7] = 0
    data = Dataset(drawn.name, drawn.modalities, drawn.labels, drawn.target, split).standardised()
    w = latents(samples, seed=0)
    return data, {"w1": w["first"], "w2": w["second"], "shared": w["shared"]}


def _trained(name: str, changes: dict[str, Any] | None, data: Dataset, quick: bool) -> Model:
    config: RunConfig = settings.starting_point(name, "synthetic-gaussian")
    sizes = {"hidden": 256, "out_dim": 64, "layers": 1}
    config = config.changed({f"model.encoder.{key}": size for key, size in sizes.items()})
    steps = {"training.batch_size": 64, "training.lr": 5e-4, "training.epochs": 2 if quick else 11}
    config = config.changed(steps | {"training.threads": 1} | (changes or {}))
    if changes is None:
        return build(config.name, config.model, data, config.seed).eval()
    with tempfile.TemporaryDirectory() as folder:
        return fit(config, data, Path(folder), progress=False).model.eval()


def _parts(model: Model, batch: Any) -> dict[str, Tensor]:
    """The encoders' outputs, Z1 and Z2, and FactorCL's factors."""
    with torch.no_grad():
        found = model.representations(batch)
    parts = dict(zip(("Z1", "Z2"), found["encoder"].chunk(2, 1), strict=True))
    parts |= {name: found[name] for name in ("U1", "U2") if name in found}
    if "S" in found:
        parts |= dict(zip(("S1", "S2"), found["S"].chunk(2, 1), strict=True))
    return parts


def _estimate(z: Tensor, w: Tensor, quick: bool) -> float:
    return mk.estimate_mi(z, w, max_steps=10 if quick else 600, progress=False).value


def _figure(rows: list[dict[str, Any]], columns: list[str]) -> Figure:
    figure = Figure(figsize=(7, 0.28 * len(rows) + 1))
    axis = figure.subplots()
    for place, name in enumerate(columns):
        at = [k + 0.27 * (place - 1) for k in range(len(rows))]
        axis.barh(at, [row[name] for row in rows], 0.25, label=name)
    axis.set_yticks(range(len(rows)), [f"{row['model']}, {row['representation']}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="estimated I(Z; w), nats")
    axis.legend(frameon=False)
    return figure
