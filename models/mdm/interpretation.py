"""The statistics network as an interpreter: how far each row's modalities agree, and what that goes along with.

    s_i = T(z_i) - log mean exp T(z')           z' over shuffled rows of the same split

For "kl" at its optimum s_i is the log ratio of the joint and the product of the modalities at row i (of z, which knows
less); for "f" the same; for "wasserstein" only its order means something. A critic that has memorised its training rows
has a high AUC there and 0.5 on rows of other people: ``auc`` is to be read on rows whose groups were not trained on.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.batch import Batch
from models.data.dataset import Dataset
from models.mdm.model import MDM
from models.mdm.shuffle import with_shuffled


@torch.no_grad()
def dependency(model: MDM, data: Dataset, rows: Tensor, shuffles: int = 20, size: int = 256) -> tuple[Tensor, Tensor]:
    """T of the rows [n] and of ``shuffles`` shuffled versions of each [shuffles n], in fp64; rows lack no modality.

    The permutations are seeded and leave the model's own generator where it is. Raises ValueError for rows without a
    modality and for fewer rows than a shuffle needs.
    """
    if shuffles < 1:
        raise ValueError(f"shuffles must be at least 1, got {shuffles}")
    batch = data.batch(rows)
    if batch.complete() is not batch:
        raise ValueError("rows must have every modality")
    if len(rows) < model.least:
        raise ValueError(f"rows must be at least {model.least}, got {len(rows)}")
    training, state = model.training, model.measure.draws.get_extra_state()
    model.eval()
    try:
        model.measure.draws.generator.manual_seed(0)
        joint = torch.cat([_scores(model, batch.take(part)) for part in torch.arange(len(rows)).split(size)])
        product = []
        for _ in range(shuffles):
            both = with_shuffled(batch, model.permutations(len(rows)), model.config.lengths)
            moved = torch.arange(len(rows), both.size)
            product += [_scores(model, both.take(part)) for part in moved.split(size)]
    finally:
        model.train(training)
        model.measure.draws.set_extra_state(state)
    return joint, torch.cat(product)


def _scores(model: MDM, batch: Batch) -> Tensor:
    parameter = next(model.parameters())
    return model.scores(model.read(batch.to(parameter.device))).double().cpu()


def pointwise(joint: Tensor, product: Tensor) -> Tensor:
    """s of rows with scores ``joint``, [n]."""
    return joint - (product.logsumexp(0) - math.log(len(product)))


def area(joint: Tensor, product: Tensor) -> float:
    """Probability that a row scores higher than a shuffled one, ties half: the area under the ROC curve."""
    ranks = torch.from_numpy(average_ranks(torch.cat([joint, product]).numpy()))
    n, m = len(joint), len(product)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor, permutations: int = 9999, seed: int = 0) -> dict[str, float]:
    """Rank correlation of a and b [n] and its two-sided p-value by permutation, (1 + hits) / (1 + permutations).

    rho is NaN and p 1 where a or b is constant. Raises ValueError for other shapes.
    """
    if a.shape != b.shape or a.dim() != 1 or len(a) < 2:
        raise ValueError(f"a and b must be [n] with n >= 2, got {tuple(a.shape)} and {tuple(b.shape)}")
    x, y = (average_ranks(t.double().numpy()) for t in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    if not scale:
        return {"rho": math.nan, "p": 1.0}
    rho, rng = float(x @ y) / scale, np.random.default_rng(seed)
    drawn = np.array([float(x @ rng.permutation(y)) for _ in range(permutations)]) / scale
    hits = int((np.abs(drawn) >= abs(rho) - 1e-12).sum())
    return {"rho": rho, "p": (1 + hits) / (1 + permutations)}


def deciles(by: Tensor, columns: dict[str, Tensor], parts: int = 10) -> list[dict[str, float]]:
    """Rows in order of ``by``, in equal parts from the lowest: the means of ``by`` and of every column in each."""
    rows = []
    for number, index in enumerate(torch.tensor_split(by.argsort(), min(parts, len(by)))):
        means = {name: float(column[index].double().mean()) for name, column in columns.items()}
        rows.append({"part": number + 1, "rows": len(index), "score": float(by[index].mean()), **means})
    return rows


def disagreement(predictions: list[Tensor], classes: bool) -> Tensor:
    """How far models of single modalities are apart on every row, [n], the mean over their pairs.

    predictions: probabilities [n, C] of classes, whose distance is the total variation; or values [n, K], whose
    distance is the mean absolute difference. Raises ValueError for fewer than two.
    """
    if len(predictions) < 2:
        raise ValueError(f"predictions must be of two modalities or more, got {len(predictions)}")
    pairs = [(a - b).abs() for a, b in combinations(predictions, 2)]
    return torch.stack([0.5 * d.sum(1) if classes else d.mean(1) for d in pairs]).mean(0)


def ranking(data: Dataset, rows: Tensor, columns: dict[str, Tensor], by: str, number: int = 10) -> dict[str, Any]:
    """The rows of the highest and the lowest ``by``, with their ids, texts and columns."""
    order = columns[by].argsort(descending=True)

    def described(index: int) -> dict[str, Any]:
        row = int(rows[index])
        found: dict[str, Any] = {"row": row} | ({"id": data.ids[row]} if data.ids else {})
        found |= {m.name: m.texts[row] for m in data.modalities if m.texts}
        return found | {name: round(float(column[index]), 4) for name, column in columns.items()}

    return {
        "high": [described(int(i)) for i in order[:number]],
        "low": [described(int(i)) for i in order.flip(0)[:number]],
    }
