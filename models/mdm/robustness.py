"""Removes the information of one modality from test rows, in three ways.

    zeros    all values are 0 in the units of the data; tokens are the padding token 0
    mean     all values are the training mean; tokens are the most frequent training token
    swap     the modality comes from another row of the same split, which preserves its marginal but not its dependence

A model that ignores a modality is perfectly robust to losing it. Compare these scores with the undamaged score and with
a model of the other modalities.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from models.data.dataset import SPLITS, Dataset, Modality

KINDS = ("zeros", "mean", "swap")


def damaged(data: Dataset, name: str, kind: str, split: str = "test", seed: int = 0) -> Dataset:
    """Damages modality ``name`` in the rows of one split of ``data``, which must not be standardised yet.

    Sequence lengths are unchanged with "zeros" and "mean", and move with the contents for "swap". Standardise
    afterwards; the statistics are those of the training rows and are therefore unchanged. Raises ValueError for an
    unknown kind, modality or split, and for "swap" in a split with one row.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if name not in data.names:
        raise ValueError(f"name must be one of {', '.join(data.names)}, got {name!r}")
    if split == "train":
        raise ValueError("split must not be train: the statistics of the data are those of its rows")
    rows = data.rows(split)
    modality = data[name]
    if kind == "swap":
        other = swapped(modality, rows, len(data), seed)
    else:
        inside = torch.isin(modality.rows_of_frames(), rows)
        other = replace(modality, values=_filled(modality, data, inside, kind), texts=())
    return replace(data, modalities=tuple(other if m.name == name else m for m in data.modalities))


def swapped(modality: Modality, rows: torch.Tensor, number: int, seed: int) -> Modality:
    """Moves the contents of ``rows`` by one position in a random order, so that no row keeps its own."""
    if len(rows) < 2:
        raise ValueError(f"swap needs two rows or more, the split has {len(rows)}")
    generator = torch.Generator().manual_seed(seed)
    order = rows[torch.randperm(len(rows), generator=generator)]
    source = torch.arange(number)
    source[order] = order.roll(1)
    return modality.select(source)


def _filled(modality: Modality, data: Dataset, inside: torch.Tensor, kind: str) -> torch.Tensor:
    """The values with those of frames ``inside`` replaced."""
    train = (data.split == SPLITS["train"])[modality.rows_of_frames()] & modality.has()[modality.rows_of_frames()]
    values = modality.values
    if kind == "zeros":
        filling = torch.zeros_like(values[:1])[0]
    elif modality.is_tokens:
        filling = values[train].mode().values
    else:
        filling = values[train].double().mean(0).to(values)
    mask = inside if values.dim() == 1 else inside[:, None]
    return torch.where(mask, filling, values)
