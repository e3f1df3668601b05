"""Loads data sets by name, or files, as a Dataset that is standardised with the statistics of its training rows.

A data set is an entry of SOURCES: a function of ``seed`` (for random splits) that returns a Dataset with raw values. It
may also take ``target`` and ``split``, the names of alternative labels or splits. ``load`` raises an error for settings
that a source does not take. ``read_file`` reads a file and takes the same arguments after the path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.batch import Batch, Inputs, Target
from models.data.dataset import SPLITS, Dataset, Modality
from models.data.labels import with_share_of_labels
from models.data.sources import SOURCES, raw, read_file
from models.data.sources.digits import load as load_digits
from models.data.sources.synthetic import generate
from models.data.sources.utd_mhad import load as load_utd_mhad
from models.data.splits import with_fewer_rows
from models.data.tokenizer import tokenised


@dataclass(frozen=True)
class DataConfig:
    """Selects the data.

    name: one of SOURCES, or the path of a file.
    modalities: names in order; empty for all.
    target, split: names of an alternative label or split, if the data has several.
    format: of a file; detected if empty.
    threshold: converts a regression target to two classes, above the threshold or not.
    standardise: see Dataset.standardised.
    tokenizer: name of a Hugging Face tokenizer for all texts, see ``models.data.tokenizer``. words: largest number of
        tokens per row.
    labels: fraction of the training labels to keep, drawn by the seed. unlabelled: False removes rows without a label
        from training.
    limit: largest number of rows of every split, drawn by the seed; 0 for all.
    """

    name: str = "digits"
    modalities: tuple[str, ...] = ()
    target: str = ""
    split: str = ""
    format: str = ""
    threshold: float | None = None
    standardise: bool = True
    tokenizer: str = ""
    words: int = 50
    labels: float = 1.0
    unlabelled: bool = True
    limit: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.labels <= 1:
            raise ValueError(f"labels must be above 0 and at most 1, got {self.labels}")
        if self.limit < 0:
            raise ValueError(f"limit must be at least 1 row, or 0 for all of them; got {self.limit}")
        if self.words < 3:
            raise ValueError(f"words must be at least 3, two of which are special tokens; got {self.words}")

    @property
    def is_file(self) -> bool:
        return self.name not in SOURCES


def load(config: DataConfig, seed: int = 0) -> Dataset:
    """Loads the data set that ``config`` describes. Raises FileNotFoundError, or ValueError that names the problem."""
    options = {"target": config.target, "split": config.split, "format": config.format}
    data = raw(config.name, seed, modalities=config.modalities, setting="data.", **options)
    if config.modalities:
        data = data.choose(config.modalities)
    if config.threshold is not None:
        data = _thresholded(data, config.threshold)
    if config.tokenizer:
        data = tokenised(data, config.tokenizer, config.words)
    if config.limit:
        data = with_fewer_rows(data, config.limit, seed)
    if config.labels < 1 or not config.unlabelled:
        data = with_share_of_labels(data, config.labels, seed, keep=config.unlabelled)
    return data.standardised() if config.standardise else data


def _thresholded(data: Dataset, threshold: float) -> Dataset:
    if not data.target.is_regression or data.target.size != 1 or data.labels is None:
        raise ValueError(f"data.threshold needs a regression target of one dimension, {data.name!r} has none")
    labels = (data.labels.reshape(-1) > threshold).long()
    if len(labels[data.labelled_rows("train")].unique()) < 2:
        given = data.labels[data.labelled_rows("train")]
        raise ValueError(
            f"data.threshold must have training labels on both sides, which lie between {float(given.min()):g} and "
            f"{float(given.max()):g}; got {threshold:g}"
        )
    names = (f"at most {threshold:g}", f"above {threshold:g}")
    return replace(data, labels=labels, target=Target.classes(2, names))


__all__ = [
    "SOURCES",
    "SPLITS",
    "Batch",
    "DataConfig",
    "Dataset",
    "Inputs",
    "Modality",
    "Target",
    "generate",
    "load",
    "load_digits",
    "load_utd_mhad",
    "read_file",
]
