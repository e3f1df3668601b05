"""Figures as inline SVG. Text remains text and uses the colour of the page, for light and dark mode."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from models.batch import Target
from models.training.history import columns, history

matplotlib.use("Agg")

# Lines, ticks and text are drawn in this colour, which is then replaced by the page's text colour.
INK = "#010203"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Distinguishable with colour-vision deficiency, and visible on white and on black.
COLOURS = ("#3b82c4", "#e08a1e", "#2f9e73", "#c2529b", "#8a6fd1", "#b05a3c", "#5aa7a7", "#9a8a2f", "#d1495b", "#7f8794")


def svg(figure: Figure, caption: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return f'<figure role="img" aria-label="{html.escape(caption)}">{text}</figure>'


def panel(width: float = 4.2, height: float = 2.9) -> Figure:
    return Figure(figsize=(width, height))


def colour(index: int, number: int) -> str:
    """Of one of ``number`` classes: the ten above, or evenly spaced hues."""
    if number <= len(COLOURS):
        return COLOURS[index]
    return matplotlib.colors.to_hex(tuple(matplotlib.colors.hsv_to_rgb((index / number, 0.65, 0.8)).tolist()))


def loss_curves(runs: Mapping[str, Sequence[Path]]) -> list[str]:
    """Training (solid) and validation loss (dashed) per epoch, one panel a model, one line a seed."""
    found = []
    with matplotlib.rc_context(STYLE):
        for index, (name, paths) in enumerate(runs.items()):
            figure = panel()
            axis = figure.subplots()
            for path in paths:
                for column, style in (("loss", "-"), ("valid_loss", "--")):
                    points = history(path, column)
                    label = {"loss": "training", "valid_loss": "validation"}[column] if path == paths[0] else None
                    marker = "o" if len(points) == 1 else None
                    axis.plot(
                        *_columns(points), style, lw=1.2, color=colour(index % 10, 10), label=label, marker=marker
                    )
            axis.set(title=name, xlabel="epoch", ylabel="loss")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
            found.append(svg(figure, f"loss of {name}"))
    return found


def term_curves(runs: Mapping[str, Sequence[Path]]) -> list[str]:
    """The first phase's terms in each model's first run, for models that have several; the legend lies below."""
    found = []
    with matplotlib.rc_context(STYLE):
        for name, paths in runs.items():
            terms = [term for term in columns(paths[0]) if term.startswith("term/") and term.count("/") == 1]
            if len(terms) < 2:
                continue
            figure = panel()
            axis = figure.subplots()
            for index, column in enumerate(terms):
                points = history(paths[0], column)
                style = "-" if index < len(COLOURS) else ":"
                axis.plot(*_columns(points), style, color=colour(index % 10, 10), label=column[5:], lw=1.4)
            axis.set(title=f"terms of {name}", xlabel="epoch", ylabel="nats or the loss's unit")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
            found.append(svg(figure, f"terms of {name}"))
    return found


def projections(parts: Mapping[str, np.ndarray], labels: Tensor, target: Target, limit: int = 400) -> list[str]:
    """Representations of up to ``limit`` rows in two dimensions: PCA to 30, then t-SNE."""
    found = []
    y = labels.numpy()[:limit]
    with matplotlib.rc_context(STYLE):
        for name, features in parts.items():
            points = np.asarray(flattened(features[:limit]))
            figure = panel(4.2, 3.8)
            axis = figure.subplots()
            axis.spines[:].set_visible(False)  # the axes of t-SNE have no meaning
            if target.is_classes:
                colours = [colour(int(label), target.size) for label in y]
                axis.scatter(points[:, 0], points[:, 1], c=colours, s=8, linewidths=0)
            else:
                drawn = axis.scatter(
                    points[:, 0], points[:, 1], c=y.reshape(len(y), -1)[:, 0], cmap="viridis", s=8, linewidths=0
                )
                figure.colorbar(drawn, ax=axis, label="target")
            axis.set(title=name, xticks=[], yticks=[])
            found.append(svg(figure, f"projection of {name}"))
    return found


def flattened(features: np.ndarray) -> np.ndarray:
    """[N, 2]; rows of width one get a second column of zeros."""
    points = PCA(min(30, *features.shape), random_state=0).fit_transform(features)
    if len(points) > 10:
        points = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="random", random_state=0).fit_transform(points)
    return np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))[:, :2]


def predictions(found: Tensor, labels: Tensor, target: Target, name: str) -> str:
    """Confusion of classes (shares of each true class), or predictions against the target."""
    with matplotlib.rc_context(STYLE):
        figure = panel(4.2, 3.6)
        axis = figure.subplots()
        if target.is_classes:
            counts = np.zeros((target.size, target.size))
            np.add.at(counts, (labels.numpy(), found.argmax(1).numpy()), 1)
            shares = counts / counts.sum(1, keepdims=True).clip(min=1)
            drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            figure.colorbar(drawn, ax=axis, label="share of the true class")
            axis.set(title=f"confusion, {name}", xlabel="predicted", ylabel="true")
            if target.size <= 12:
                ticks = [str(n) for n in target.names or range(target.size)]
                axis.set_xticks(range(target.size), ticks, rotation=45 if target.names else 0)
                axis.set_yticks(range(target.size), ticks)
        else:
            wanted, given = labels.reshape(len(labels), -1)[:, 0], found[:, 0]
            axis.scatter(wanted, given, s=10, color=COLOURS[0], alpha=0.6, linewidths=0)
            ends = [float(wanted.min()), float(wanted.max())]
            axis.plot(ends, ends, color=INK, lw=0.8, ls="--")
            axis.set(title=f"predictions, {name}", xlabel="target", ylabel="prediction")
        return svg(figure, f"predictions of {name}")


def robustness(curves: Mapping[str, Sequence[tuple[float, float, float]]], metric: str) -> str:
    """(level of noise, mean, deviation) of the metric by model."""
    with matplotlib.rc_context(STYLE):
        figure = panel()
        axis = figure.subplots()
        for index, (name, points) in enumerate(curves.items()):
            x, y, spread = (np.asarray(values) for values in zip(*points, strict=True))
            axis.plot(x, y, "o-", ms=3.5, lw=1.4, color=colour(index % 10, 10), label=name)
            axis.fill_between(x, y - spread, y + spread, color=colour(index % 10, 10), alpha=0.15, lw=0)
        axis.set(title="noise on all inputs", xlabel="deviation of the noise", ylabel=f"test {metric}")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)
        return svg(figure, "robustness to noise")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [e for e, _ in points], [v for _, v in points]
