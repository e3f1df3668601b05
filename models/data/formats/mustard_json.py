"""MUStARD's ``sarcasm_data.json``: ``{id: {utterance, speaker, context, context_speakers, show, sarcasm}}``.

Texts ``utterance`` and ``context`` (its sentences joined by newlines), labels ``sarcasm`` (two classes); rows of one
speaker form a group. Video and audio are not part of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats.arrays import Arrays, codes
from models.data.formats.checks import listed, require, require_data

NAME = "mustard"


def fits(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def read(path: str | Path) -> Arrays:
    """Arrays of the file. Raises FileNotFoundError, or ValueError naming the file, the id and the key."""
    path = require_data(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not complete JSON: {error}") from error
    if not isinstance(content, dict) or not content or not all(isinstance(item, dict) for item in content.values()):
        raise ValueError(f"{path} must be a dictionary of utterances, it is a {type(content).__name__}")
    result = Arrays(str(path), NAME, ids=tuple(content))
    rows = [(f" utterance {name[:40]!r}", item) for name, item in content.items()]
    result.texts["utterance"] = [_text(item, "utterance", path, where) for where, item in rows]
    result.texts["context"] = [_context(item, path, where) for where, item in rows]
    result.texts["speaker"] = [_text(item, "speaker", path, where) for where, item in rows]
    result.labels["sarcasm"] = np.array([_flag(item, path, where) for where, item in rows])
    result.classes["sarcasm"] = ("plain", "sarcastic")
    result.groups = codes(result.texts["speaker"])
    empty = sum(not text.strip() for text in result.texts["utterance"])
    if empty:
        result.notes.append(f"utterance: {empty} rows are empty")
    known = {"utterance", "context", "context_speakers", "speaker", "show", "sarcasm"}
    rest = sorted({key for _, item in rows for key in item} - known)
    if rest:
        result.notes.append(f"not used: {listed(rest)}")
    return result.check()


def _text(item: dict[str, Any], key: str, path: Path, where: str) -> str:
    value = require(item, key, path, where)
    if not isinstance(value, str):
        raise ValueError(f"{path}{where}: {key!r} must be a string, got {str(value)[:40]}")
    return value


def _context(item: dict[str, Any], path: Path, where: str) -> str:
    value = require(item, "context", path, where)
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise ValueError(f"{path}{where}: 'context' must be a list of strings, got {str(value)[:40]}")
    return "\n".join(value)


def _flag(item: dict[str, Any], path: Path, where: str) -> int:
    value = require(item, "sarcasm", path, where)
    if value not in (True, False):
        raise ValueError(f"{path}{where}: 'sarcasm' must be true or false, got {str(value)[:40]}")
    return int(value)
