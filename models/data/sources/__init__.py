"""Data sets by name: one module each, which says where its files lie, their label, split and checksums.

A module has ``load(seed=0, ...) -> Dataset`` with raw values. It may take ``target`` and ``split``, the names of
another label or split of the same data, and ``modalities``, where some are left out unless they are named. To add one:
its module and its line in MODULES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from types import ModuleType

from models.data import formats
from models.data.assemble import assemble
from models.data.dataset import Dataset
from models.data.sources import (
    avdigits,
    avdigits_small,
    digits,
    mmmo,
    mosi,
    mosi_dialogue,
    mustard,
    synthetic,
    synthetic_gaussian,
    two_digit,
    two_digit_small,
    utd_mhad,
)

MODULES: dict[str, ModuleType] = {
    "digits": digits,
    "synthetic": synthetic,
    "synthetic-gaussian": synthetic_gaussian,
    "two-digit": two_digit,
    "two-digit-small": two_digit_small,
    "utd-mhad": utd_mhad,
    "mosi": mosi,
    "mosi-dialogue": mosi_dialogue,
    "mmmo": mmmo,
    "avdigits": avdigits,
    "avdigits-small": avdigits_small,
    "mustard": mustard,
}
SOURCES: dict[str, Callable[..., Dataset]] = {name: module.load for name, module in MODULES.items()}


def read_file(
    path: str | Path,
    seed: int = 0,
    *,
    target: str = "",
    split: str = "",
    format: str = "",
    kind: str = "",
    modalities: Sequence[str] = (),
) -> Dataset:
    """A file or folder in any format of ``models.data.formats`` as a Dataset with raw values; see ``assemble``.

    Raises FileNotFoundError, or ValueError that names the file and the key that is missing or malformed.
    """
    arrays = formats.read(path, format or None)
    return assemble(arrays, Path(path).stem, seed, target=target, kind=kind, split=split, modalities=modalities)


def load(
    name_or_path: str | Path,
    seed: int = 0,
    modalities: Sequence[str] | None = None,
    *,
    target: str = "",
    split: str = "",
) -> Dataset:
    """A data set by name, or a file or folder by path, standardised with the statistics of its training rows.

    modalities: their names in order; all by default. Raises FileNotFoundError, or ValueError that names what does not
    fit.
    """
    name = str(name_or_path)
    options = {key: value for key, value in {"target": target, "split": split}.items() if value}
    if name in SOURCES:
        accepted = signature(SOURCES[name]).parameters
        for option in options:
            if option not in accepted:
                raise ValueError(f"{option} must be left out for {name!r}, which has one only")
        named = {"modalities": tuple(modalities)} if modalities and "modalities" in accepted else {}
        data = SOURCES[name](seed=seed, **options, **named)
    elif Path(name).exists() or Path(name).suffix:
        data = read_file(name, seed, modalities=tuple(modalities or ()), **options)
    else:
        raise ValueError(
            f"data must be {', '.join(SOURCES)}, or a file or folder; got {name!r}, which is none of these"
        )
    return (data.choose(tuple(modalities)) if modalities else data).standardised()
