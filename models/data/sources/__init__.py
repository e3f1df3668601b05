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
from models.data.formats.checks import suggestion
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


def raw(
    name: str | Path, seed: int = 0, *, modalities: Sequence[str] = (), setting: str = "", **options: str
) -> Dataset:
    """A data set by name, or a file or folder by path: raw values, and all modalities that come with those named.

    options: ``target``, ``split`` and ``format``; empty ones count as not given. setting: stands before their names in
    errors. Raises FileNotFoundError, or ValueError that names what does not fit.
    """
    name, given = str(name), {key: value for key, value in options.items() if value}
    source: Callable[..., Dataset] = SOURCES.get(name, read_file)
    if name not in SOURCES and not Path(name).exists() and not Path(name).suffix:
        raise ValueError(
            f"data must be {', '.join(SOURCES)}, or a file or folder; got {name!r}, which is neither"
            + suggestion(name, SOURCES)
        )
    accepted = signature(source).parameters
    for option in given:
        if option not in accepted:
            raise ValueError(f"{setting}{option} must be left out for {name!r}, which has one only")
    named = {"modalities": tuple(modalities)} if modalities and "modalities" in accepted else {}
    return source(*(() if name in SOURCES else (name,)), seed=seed, **given, **named)


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
    data = raw(name_or_path, seed, modalities=modalities or (), target=target, split=split)
    return (data.choose(tuple(modalities)) if modalities else data).standardised()
