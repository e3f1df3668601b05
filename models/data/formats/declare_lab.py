"""The pickles of MISA and MMIM (declare-lab): a folder with ``train.pkl``, ``dev.pkl`` and ``test.pkl``.

Each is a list of rows ``((word ids, visual [T, d], acoustic [T, d], words[, visual length, acoustic length]), label,
segment)``; labels are [1, 1], or [1, 7] with the sentiment first and six emotions behind it, segments "video[clip]".
Word ids count from 0, which is padding here: they are raised by 1. Values that are not finite become 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.data import safe_pickle
from models.data.formats.arrays import SPLIT_CODES, Arrays, Part, codes, offsets_of, strings
from models.data.formats.checks import numbers, require_data
from models.data.formats.repairs import sequences

NAME = "declare-lab"
FILES = ("train", "dev", "test")
LENGTH_OF = {"visual": 4, "acoustic": 5}


def fits(path: Path) -> bool:
    return path.is_dir() and all((path / f"{name}.pkl").is_file() for name in FILES)


def read(path: str | Path) -> Arrays:
    """Arrays of the folder. Raises FileNotFoundError, or ValueError naming the file and the row that is malformed."""
    path = Path(path)
    rows = {name: _rows(path / f"{name}.pkl") for name in FILES}
    every = [row for name in FILES for row in rows[name]]
    result = Arrays(str(path), NAME)
    ids = [_word_ids(parts[0], path, i) for i, (parts, _, _) in enumerate(every)]
    result.modalities["text"] = Part(np.concatenate(ids), offsets_of([len(row) for row in ids]))
    for place, name in enumerate(("visual", "acoustic"), 1):
        frames = [_frames(parts, place, name, path, i) for i, (parts, _, _) in enumerate(every)]
        result.modalities[name] = sequences(frames, path, name, result.notes, infinite="zero", nan="zero")
    _add_labels(result, [label for _, label, _ in every], path)
    result.texts["words"] = [" ".join(strings(parts[3], path, "words")) for parts, _, _ in every]
    result.ids = tuple(strings([segment for _, _, segment in every], path, "segment"))
    if all("[" in name for name in result.ids):
        result.groups = codes([name.split("[")[0] for name in result.ids])
    result.split = np.repeat([SPLIT_CODES[name] for name in FILES], [len(rows[name]) for name in FILES])
    return result.check()


def _rows(file: Path) -> list[Any]:
    content = safe_pickle.load(require_data(file))
    if not isinstance(content, list) or not content:
        raise ValueError(f"{file} must hold a list of rows, it is a {type(content).__name__}")
    for i, row in enumerate(content):
        parts = row[0] if isinstance(row, tuple | list) and len(row) == 3 else None
        if not isinstance(parts, tuple | list) or len(parts) not in (4, 6):
            raise ValueError(f"{file}: row {i} must be ((word ids, visual, acoustic, words), label, segment)")
    return content


def _word_ids(value: Any, path: Path, row: int) -> np.ndarray:
    found = numbers(value, path, f"word ids of row {row}").reshape(-1)
    if found.min() < 0 or found.max() > 2**24 or (found != np.round(found)).any():
        raise ValueError(f"{path}: word ids of row {row} must be whole numbers, got {found.min():g} to {found.max():g}")
    return found.astype(np.int64) + 1


def _frames(parts: Any, place: int, name: str, path: Path, row: int) -> np.ndarray:
    """Frames [T, d], cut to the length that MMIM's files state."""
    values = np.asarray(parts[place])
    if values.ndim != 2:
        raise ValueError(f"{path}: {name} of row {row} must be [steps, features], got {values.shape}")
    if len(parts) <= LENGTH_OF[name]:
        return values
    length = numbers(parts[LENGTH_OF[name]], path, f"length of {name} in row {row}").reshape(-1)
    if length.shape != (1,) or not 0 <= length[0] <= len(values) or length[0] != round(float(length[0])):
        raise ValueError(f"{path}: length of {name} in row {row} must lie in 0 to {len(values)}, got {length.tolist()}")
    return values[: int(length[0])]


def _add_labels(result: Arrays, labels: list[Any], path: Path) -> None:
    columns = [numbers(label, path, f"label of row {i}").reshape(-1) for i, label in enumerate(labels)]
    widths = sorted({len(column) for column in columns})
    if widths not in ([1], [7]):
        raise ValueError(f"{path}: labels must have 1 or 7 columns in every row, got {widths}")
    table = np.stack(columns)
    result.labels["sentiment"] = table[:, 0]
    if widths == [7]:
        result.labels["emotions"] = table[:, 1:]
    result.kinds = {name: "regression" for name in result.labels}
