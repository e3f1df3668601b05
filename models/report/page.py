"""report.html: one self-contained page with the table, loss curves, factor projections and step times."""

from __future__ import annotations

import base64
import html
import io
import statistics
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import mi_kernels as mk
from models.data import PairedData
from models.evaluation import Parts
from models.runs import RunConfig, build
from models.training import Training, frozen, history

matplotlib.use("Agg")

# The last of them that is available is what runs when nobody names one on a CPU.
BACKENDS = ("reference", "chunked", "cpu")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.25em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}img{max-width:100%}
.note{color:#666}"""


def step_times(config: RunConfig, data: PairedData, steps: int = 7) -> dict[str, float]:
    """Median seconds of one whole training step (theta and phi), measured in turns in this process.

    Per backend that runs here: "reference", "chunked" and, with the compiled extension, "cpu".
    """
    module = Training(build(config, data), data, config)
    batch = data.batch(data.rows("train")[: config.batch_size])
    theta, *inner = module.configure_optimizers()

    def step() -> None:
        views = module.views(batch, module.generator(0))
        theta.zero_grad()
        with frozen(module.model.inner_parameters()):
            module.model.loss(batch, views)[0].backward()
        theta.step()
        for phi in inner:
            phi.zero_grad()
            module.model.inner_loss(batch, views).backward()
            phi.step()

    names = [name for name in BACKENDS if mk.backends()[name] == "available"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(steps + 1):
        for name in names:
            start = time.perf_counter()
            with mk.use_backend(name):
                step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded}">'


def loss_curves(runs: dict[str, list[Path]]) -> str:
    """Training loss per epoch of every run, one panel per model; FactorCL's six terms in a last panel."""
    terms = next((paths[0] for name, paths in runs.items() if name.startswith("factorcl")), None)
    panels = len(runs) + (terms is not None)
    figure = Figure(figsize=(min(3.6 * panels, 18), 3))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, (name, paths) in zip(axes, runs.items(), strict=False):
        for path in paths:
            for column, style in (("loss", "-"), ("valid_loss", ":")):
                points = history(path, column)
                axis.plot([e for e, _ in points], [v for _, v in points], style, lw=1)
        axis.set(title=name, xlabel="epoch")
    if terms is not None:
        for name in (
            "infonce_x1x2",
            "club_x1x2_cond",
            "infonce_x1y",
            "infonce_x2y",
            "club_x1x2",
            "infonce_x1x2_cond",
        ):
            points = history(terms, f"term/{name}")
            axes[-1].plot([e for e, _ in points], [v for _, v in points], label=name, lw=1)
        axes[-1].set(title="six terms, nats", xlabel="epoch")
        axes[-1].legend(fontsize=6)
    figure.tight_layout()
    return _image(figure, "loss curves")


def projections(parts: Parts, data: PairedData, limit: int = 500) -> str:
    """The factors of up to ``limit`` test rows in two dimensions: PCA to 30, then t-SNE."""
    rows = data.rows("test").numpy()[:limit]
    figure = Figure(figsize=(3.4 * len(parts), 3.4))
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, (name, features) in zip(axes, parts.items(), strict=True):
        points = features[rows]
        points = PCA(min(30, *points.shape), random_state=0).fit_transform(points)
        if len(rows) > 10:
            points = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0).fit_transform(points)
        axis.scatter(
            *np.asarray(points)[:, :2].T,
            c=data.y[rows],
            cmap="tab10" if data.num_classes <= 10 else "hsv",
            s=6,
        )
        axis.set(title=name, xticks=[], yticks=[])
    figure.tight_layout()
    return _image(figure, "projection of the factors, coloured by class")


def _table(summary: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(row['model'])}</td><td>{html.escape(row['representation'])}</td>"
        f"<td>{row['mean']:.3f} ± {row['deviation']:.3f}</td><td>{row['seeds']}</td></tr>"
        for row in summary
    )
    return f"<table><tr><th>model</th><th>representation</th><th>test accuracy</th><th>seeds</th></tr>{rows}</table>"


def write(
    path: Path,
    *,
    data: PairedData,
    summary: list[dict[str, Any]],
    chance: float,
    runs: dict[str, list[Path]],
    parts: Parts,
    seconds: dict[str, float],
    config: RunConfig,
    common: Collection[str],
) -> None:
    """Writes the page; ``runs`` maps a model to the folders of its seeds, ``parts`` are factors of one of them.

    ``config`` is that of the run whose factors are shown, ``common`` names the settings that all runs share.
    """
    default = list(seconds)[-1]
    ratio = seconds["reference"] / seconds[default]
    times = "".join(f"<tr><td>{name}</td><td>{value:.4f}</td></tr>" for name, value in seconds.items())
    title = f"Factorized contrastive learning on {data.name}"
    shown = ("epochs", "batch_size", "lr", "hidden", "feature_dim", "critic_hidden", "preset")
    settings = ", ".join(f"{name} {getattr(config, name)}" for name in shown if name in common)
    body = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{STYLE}</style><h1>{html.escape(title)}</h1>
<p>{len(data)} samples, {data.num_classes} classes, modalities {html.escape(data.first.name)} and
{html.escape(data.second.name)}. The same for every model: {html.escape(settings)}.</p>
<h2>Linear probes</h2>{_table(summary)}
<p class="note">Mean and sample deviation over seeds; the most frequent class scores {chance:.3f}. Logistic
regression on standardised features, fitted on the training rows; its strength was chosen on the validation rows.</p>
<h2>Training</h2>{loss_curves(runs)}
<p class="note">One line per seed; dotted: validation rows.</p>
<h2>Factors</h2>{projections(parts, data)}
<p class="note">t-SNE of test rows, coloured by class; S is shared, U1 and U2 are unique to each modality.</p>
<h2>Seconds per training step</h2>
<table><tr><th>backend</th><th>{html.escape(config.model)}, batch {config.batch_size}</th></tr>
{times}</table>
<p class="note">Medians measured in turns while this page was written, {torch.get_num_threads()} threads,
torch {torch.__version__}: the backend that
runs by default here, {default}, is {ratio:.2f} times as fast as the reference.</p></html>"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
