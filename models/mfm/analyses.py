"""MFM's analyses on data whose factors are known: where F_y acts, how much of a modality it has, swapped factors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.batch import Target
from models.data.corruption import CorruptionConfig, corrupted
from models.data.dataset import Dataset, Modality
from models.data.sources.two_digit import small_pool
from models.evaluation.probes import Probe
from models.evaluation.runs import write_json
from models.evaluation.summary import moments
from models.mfm.config import Settings
from models.mfm.interpretation import gradient_curves, information_ratios, swapped
from models.mfm.model import MFM, build
from models.provenance import describe

matplotlib.use("Agg")

STEPS = 12
# The steps at which the label shows in each modality of ``timed``.
SHOWN = {"early": (1, 4), "late": (8, 11), "never": (0, 0)}


PICTURES = Settings(
    encoder="separate", pictures="convolution", code=8, joint_code=16, factor=32, joint_factor=32, hidden=64,
    dropout=0.0, reconstruction=20.0, prior="analytic", prior_weight=1.0,
)  # fmt: skip


def timed(rows: int = 1000, seed: int = 0) -> Dataset:
    """Three modalities [12 steps, 3]: a style of each row in all steps, and the label at the steps of SHOWN alone."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (rows,), generator=generator)
    ends = torch.arange(rows + 1) * STEPS
    modalities = []
    for name, (first, last) in SHOWN.items():
        style = torch.randn(rows, 1, 2, generator=generator).expand(-1, STEPS, -1)
        label = torch.zeros(rows, STEPS, 1)
        label[:, first:last] = 2.0 * y[:, None, None] - 1
        values = torch.cat([label, style], 2) + 0.1 * torch.randn(rows, STEPS, 3, generator=generator)
        modalities.append(Modality(name, values.reshape(-1, 3), ends))
    split = torch.tensor([0, 0, 0, 1, 2]).repeat(rows // 5)
    return Dataset("timed", tuple(modalities), y, Target.classes(2), split)


def paired_digits(rows: int = 2000, seed: int = 0) -> tuple[Dataset, Tensor]:
    """Two pictures of a digit in every row, and the style of the second: [N] bool, white on black or black on white.

    Both are of scikit-learn's 8 x 8 digits, different ones; no picture is in two splits.
    """
    images, digits = (torch.from_numpy(part) for part in small_pool())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    pools = order.split([len(order) * 3 // 5, len(order) // 5, len(order) - len(order) * 3 // 5 - len(order) // 5])
    split = torch.tensor([0, 0, 0, 1, 2]).repeat(rows // 5)
    y = torch.randint(10, (rows,), generator=generator)
    picked = torch.zeros(2, rows, dtype=torch.int64)
    for part, pool in enumerate(pools):
        for digit in range(10):
            here = torch.nonzero((split == part) & (y == digit)).flatten()
            known = pool[digits[pool] == digit]
            picked[:, here] = known[torch.randint(len(known), (2, len(here)), generator=generator)]
    negative = torch.rand(rows, generator=generator) < 0.5
    first, second = (images[p].flatten(1) for p in picked)
    second = torch.where(negative[:, None], 1 - second, second)
    shape = (images.shape[1], images.shape[2])
    modalities = (Modality("plain", first, shape=shape), Modality("inverted", second, shape=shape))
    return Dataset("paired-digits", modalities, y, Target.classes(10), split), negative


def trained(data: Dataset, settings: Settings, steps: int, rate: float = 3e-3, seed: int = 0) -> MFM:
    """Every phase of the model by Adam of its own, on batches of 64 training rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(MFM, build(settings, data)).train()
        phases = [(phase, torch.optim.Adam(phase.parameters, rate)) for phase in model.phases()]
        rows = data.rows("train")
        for _ in range(steps):
            batch: Any = data.batch(rows[torch.randint(len(rows), (64,))])
            for phase, optimizer in phases:
                with torch.no_grad():
                    given = phase.fixed(batch) if phase.fixed else batch
                optimizer.zero_grad()
                phase.loss(given).total.backward()
                optimizer.step()
    return model.eval()


SEEDS = (0, 1, 2, 3, 4)


def seeds_of(quick: bool) -> tuple[int, ...]:
    return SEEDS[:1] if quick else SEEDS


def averaged(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of which each number is the mean over runs and has its deviation, "NAME_sd", beside it."""
    rows = []
    for same in zip(*runs, strict=True):
        row: dict[str, Any] = {}
        for name, value in same[0].items():
            if not isinstance(value, float):
                row[name] = value
                continue
            values = [run[name] for run in same]
            found = moments(values)
            row |= {name: found["mean"], f"{name}_sd": found["deviation"]}
        rows.append(row)
    return rows


def interpretation(out: Path, quick: bool = False) -> str:
    """Both interpretations on ``timed``: |d x'_t / d F_y|^2 per step, and HSIC(F_y, x') / HSIC(F_m, x').

    The truth: F_y acts at the steps of SHOWN, and nowhere in "never". 300 steps of training (quick: 20). The curves of
    the figure are those of the first of SEEDS; values are means over all.
    """
    found = [_interpreted(seed, quick) for seed in seeds_of(quick)]
    (curves, ratios), rows = found[0][:2], averaged([rows for _, _, rows in found])
    shown = {"shown": SHOWN, "curves": {name: curve.tolist() for name, curve in curves.items()}}
    write_json(out / "mfm-interpretation.json", {"machine": describe(), **shown, "rows": rows})
    figure = Figure(figsize=(7.5, 3))
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for place, (name, curve) in enumerate(curves.items()):
        left.plot(range(STEPS), curve, "o-", color=f"C{place}", label=name, ms=3)
        if SHOWN[name][1]:
            left.axvspan(SHOWN[name][0] - 0.5, SHOWN[name][1] - 0.5, color=f"C{place}", alpha=0.12)
    left.set(xlabel="step (shaded: the label shows there)", ylabel="squared slope of x' by F_y")
    left.legend(frameon=False)
    right.bar(list(ratios), list(ratios.values()), color=["C0", "C1", "C2"])
    right.set(ylabel="HSIC(F_y, x') / HSIC(F_m, x')")
    figure.savefig(out / "mfm-interpretation.svg", bbox_inches="tight")
    return _table(rows)


def _interpreted(seed: int, quick: bool) -> tuple[dict[str, Tensor], dict[str, float], list[dict[str, Any]]]:
    """Mean curves, HSIC ratios, and both in rows by modality."""
    data = timed(200 if quick else 1000, seed)
    settings = Settings(
        code=4, joint_code=1, factor=8, joint_factor=8, hidden=16, memory=8, networks=16, dropout=0.0,
        network_dropout=0.0, reconstruction=0.3, prior="analytic", prior_weight=0.3,
    )  # fmt: skip
    model = trained(data, settings, 20 if quick else 300, seed=seed)
    batch = data.batch(data.rows("test"))
    with torch.no_grad():
        factors = model.net.factors(model.codes(batch.inputs))
    curves = {name: c.mean(0) for name, c in gradient_curves(model.net, factors, STEPS).items()}
    ratios = information_ratios(model.net, factors, STEPS)
    rows = []
    for name, curve in curves.items():
        first, last = SHOWN[name]
        share = (curve[first:last].sum() / curve.sum().clamp(min=1e-12)).item()
        rows.append({"modality": name, "share_where_shown": share, "mean_slope": curve.mean().item()})
        rows[-1] |= {"hsic_ratio": ratios[name]}
    return curves, ratios, rows


def swap(out: Path, quick: bool = False) -> str:
    """Pictures decoded with F_y of one row and F_m of another, on ``paired_digits`` with convolutions.

    Row i of the grid has F_y of row i, column j has F_m of row j. Scored on 60 test rows: how often a linear probe of
    real pictures reads in the decoded one the digit of F_y's row, and how often it is as bright (black on white or
    white on black) as the picture of F_m's row; pairs with different digits and different styles alone. 1,000 steps
    of training (quick: 20). The grid is that of the first of SEEDS; values are means over all.
    """
    found = [_swapped(seed, quick) for seed in seeds_of(quick)]
    rows = averaged([[row] for _, row in found])
    write_json(out / "mfm-swap.json", {"machine": describe(), "rows": rows})
    found[0][0].savefig(out / "mfm-swap.svg", bbox_inches="tight")
    return _table(rows)


def _swapped(seed: int, quick: bool) -> tuple[Figure, dict[str, float]]:
    data, negative = paired_digits(400 if quick else 2000, seed)
    model = trained(data, PICTURES, 20 if quick else 1000, seed=seed)
    rows = data.rows("test")[:60]
    labels = cast(Tensor, data.labels)
    batch = data.batch(rows)
    with torch.no_grad():
        factors = model.net.factors(model.codes(batch.inputs))
        head = (model.predict(batch).argmax(1) == labels[rows]).float().mean().item()
    grid = swapped(model.net, factors, "inverted", 1)[:, :, 0]  # [60, 60, 64]
    digit = Probe(_upright(data["inverted"].values).numpy(), data)
    style = (grid.mean(2) > 0.5).float()
    different = (labels[rows][:, None] != labels[rows]) & (negative[rows][:, None] != negative[rows])
    read = digit.predict(_upright(grid.flatten(0, 1)).numpy()).argmax(1).reshape(len(rows), -1)
    real = digit.predict(_upright(data["inverted"].values[rows]).numpy()).argmax(1)
    on_real = (real == labels[rows]).float().mean().item()

    def share(agrees: Tensor) -> float:
        return agrees[different].float().mean().item()

    row = {
        "digit_of_F_y": share(read == labels[rows][:, None]),
        "digit_of_F_m": share(read == labels[rows]),
        "style_of_F_m": share(style == negative[rows].float()),
        "probe_on_real": on_real,
        "head": head,
        "pairs": float(different.sum()),
    }
    return _grid(grid, batch.inputs["inverted"].values, labels[rows]), row


def _upright(pictures: Tensor) -> Tensor:
    """Pictures [N, D] as white on black."""
    return torch.where(pictures.mean(1, keepdim=True) > 0.5, 1 - pictures, pictures)


MISSING: dict[str, dict[str, Any]] = {
    "surrogates": {"surrogate": True},
    "surrogates, own steps": {"surrogate": True, "surrogate_phase": True},
    "zeros": {},
    "seq2seq (generative)": {"variant": "seq2seq"},
    "M_B (discriminative)": {"variant": "M_B"},
}


def missing(out: Path, quick: bool = False) -> str:
    """Test accuracy with the second picture of ``paired_digits`` missing, and the error of its reconstruction.

    MFM with surrogate codes (trained by its loss, or in steps of their own), MFM that sees zeros, and the purely
    generative and discriminative baselines, 1,000 steps of training each (quick: 5). The error is of pixels in [0, 1];
    a constant picture, the training mean, stands beside.
    """
    found = averaged([_missing(seed, quick) for seed in seeds_of(quick)])
    write_json(out / "mfm-missing.json", {"machine": describe(), "missing": "inverted", "rows": found})
    figure = Figure(figsize=(6, 3))
    axis = figure.subplots()
    shown = [row for row in found if row["both"] is not None]
    for place, column in enumerate(("both", "missing")):
        axis.bar([k + 0.4 * place for k in range(len(shown))], [row[column] for row in shown], 0.4, label=column)
    axis.set_xticks([k + 0.2 for k in range(len(shown))], [row["model"] for row in shown], fontsize=7)
    axis.set(ylabel="test accuracy")
    axis.legend(frameon=False)
    figure.savefig(out / "mfm-missing.svg", bbox_inches="tight")
    return _table(found)


def _missing(seed: int, quick: bool) -> list[dict[str, Any]]:
    data, _ = paired_digits(400 if quick else 2000, seed)
    rows, name = data.rows("test"), "inverted"
    labels, batch = cast(Tensor, data.labels)[rows], data.batch(rows)
    gone = CorruptionConfig(drop={name: 1.0})
    found: list[dict[str, Any]] = []
    for label, changes in MISSING.items():
        model = trained(data, replace(PICTURES, **changes), 5 if quick else 1000, seed=seed)
        with torch.no_grad():
            seen, unseen = (
                (model.predict(b).argmax(1) == labels).float().mean().item()
                for b in (batch, corrupted(batch, gone, 0, keep_one=False))
            )
            error = None
            if model.net.parts.generative:
                rebuilt, wanted = model.rebuilt(batch.inputs, name)
                error = (rebuilt - wanted.values).square().mean().item()
        found.append({"model": label, "both": seen, "missing": unseen, "error": error})
    train = data[name].values[data.rows("train")].mean(0)
    mean = (data[name].values[rows] - train).square().mean().item()
    found.append({"model": "training mean", "both": None, "missing": None, "error": mean})
    return found


def _grid(grid: Tensor, real: Tensor, labels: Tensor, shown: int = 8) -> Figure:
    """The first row that shows each digit against the same rows: F_y down, F_m across, real pictures at the margins."""
    chosen = [int(torch.nonzero(labels == d)[0]) for d in range(10) if bool((labels == d).any())][:shown]
    step = 10  # pixels from picture to picture
    canvas = torch.full((step * (len(chosen) + 1), step * (len(chosen) + 1)), 0.5)

    def place(a: int, b: int, picture: Tensor) -> None:
        canvas[a * step + 1 : a * step + 9, b * step + 1 : b * step + 9] = picture.reshape(8, 8)

    for a, i in enumerate(chosen, 1):
        place(a, 0, real[i])
        place(0, a, real[i])
        for b, j in enumerate(chosen, 1):
            place(a, b, grid[i, j])
    figure = Figure(figsize=(5, 5))
    axis = figure.subplots()
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlabel="F_m of the picture above", ylabel="F_y of the picture at the left")
    return figure


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if not name.endswith("_sd")))

    def cell(row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        return f"{value:.3f} ± {row[name + '_sd']:.3f}" if isinstance(value, float) else f"{value or ''}"

    lines = ["  ".join(f"{name:>20}" for name in names)]
    return "\n".join([*lines, *("  ".join(f"{cell(row, name):>20}" for name in names) for row in rows)])
