"""Computational sequences of the CMU-MultimodalSDK (``.csd``, HDF5): MOSI, MOSEI and POM at their highest resolution.

``/<root>/data/<entry>/features`` [T, D] and ``intervals`` [T, 2] in seconds, ``/<root>/metadata/<key>`` strings. One
file is one modality, an entry (a video) a row. A folder of them is a data set: the file whose root or name says "label"
gives the rows, one per labelled interval, and every modality the frames whose middle lies in that interval. Rows of a
video form a group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.data.formats.arrays import Arrays, Part, codes
from models.data.formats.checks import check_size, file_bytes, listed, numbers
from models.data.formats.hdf5 import read_files
from models.data.formats.repairs import sequences

NAME = "csd"


def fits(path: Path) -> bool:
    """A folder with ``.csd`` files, or one of them."""
    return any(path.glob("*.csd")) if path.is_dir() else path.suffix == ".csd"


def read(path: str | Path) -> Arrays:
    """Arrays of one ``.csd`` or of a folder. Raises FileNotFoundError, or ValueError naming the file and the entry."""
    path = Path(path)
    files = sorted(path.glob("*.csd")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no .csd files")
    notes: list[str] = []
    found = [_sequence(content, file, notes) for file, content in zip(files, read_files(files), strict=True)]
    labels = [i for i, (root, _) in enumerate(found) if "label" in root.lower() or "label" in files[i].stem.lower()]
    if len(files) > 1 and len(labels) == 1:
        return _aligned(path, found, labels[0], notes).check()
    if len(files) > 1:
        raise ValueError(
            f"{path} must hold one .csd of labels, it has {len(labels)} among {listed(f.name for f in files)}"
        )
    root, entries = found[0]
    part = sequences([features for features, _ in entries.values()], path, root, notes, infinite="zero")
    return Arrays(str(path), NAME, {root: part}, ids=tuple(entries), notes=notes).check()


Entries = dict[str, tuple[np.ndarray, np.ndarray]]


def _sequence(content: dict[str, Any], path: Path, notes: list[str]) -> tuple[str, Entries]:
    """Name and entries (features, intervals) of one computational sequence."""
    roots = {name.split("/")[0] for name in content}
    if len(roots) != 1:
        raise ValueError(f"{path} must hold one computational sequence, it has {listed(sorted(roots))}")
    root = roots.pop()
    names: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        parts = name.split("/")
        if len(parts) == 4 and parts[1] == "data" and isinstance(value, np.ndarray):
            names.setdefault(parts[2], {})[parts[3]] = value
    if not names:
        raise ValueError(f"{path}: {root!r} has no data/<entry>/features; it has {listed(content)}")
    return root, {entry: _entry(fields, path, f"{root}/data/{entry}") for entry, fields in names.items()}


def _entry(fields: dict[str, np.ndarray], path: Path, where: str) -> tuple[np.ndarray, np.ndarray]:
    for key in ("features", "intervals"):
        if key not in fields:
            raise ValueError(f"{path}: {where} has no {key!r}; it has {listed(fields)}")
    features, intervals = fields["features"], fields["intervals"]
    features = features[:, None] if features.ndim == 1 else features
    if features.ndim != 2 or intervals.shape != (len(features), 2):
        raise ValueError(
            f"{path}: {where} must have features [T, D] and intervals [T, 2], got {features.shape}, {intervals.shape}"
        )
    return features, intervals.astype(np.float64)


def _aligned(path: Path, found: list[tuple[str, Entries]], chosen: int, notes: list[str]) -> Arrays:
    """Rows are the labelled intervals; every other sequence gives each row its frames."""
    root, labelled = found.pop(chosen)
    rows = [(entry, i) for entry, (features, _) in labelled.items() for i in range(len(features))]
    if not rows:
        raise ValueError(f"{path}: {root!r} labels nothing")
    labels = numbers(np.concatenate([features for features, _ in labelled.values()]), path, root)
    videos = [entry.split("[")[0] for entry, _ in rows]
    result = Arrays(str(path), NAME, notes=notes, ids=tuple(f"{entry}[{i}]" for entry, i in rows), groups=codes(videos))
    result.kinds[root] = "regression"
    result.labels[root] = labels[:, 0] if labels.shape[1] == 1 else labels
    for name, entries in found:
        if name in result.modalities:
            raise ValueError(f"{path} has two sequences called {name!r}")
        result.modalities[name] = _cut(path, name, entries, [(e, labelled[e][1][i]) for e, i in rows], notes)
    return result


def _cut(path: Path, name: str, entries: Entries, rows: list[tuple[str, np.ndarray]], notes: list[str]) -> Part:
    width = next(iter(entries.values()))[0].shape[1]
    items, absent = [], set()
    for entry, (start, stop) in rows:
        if entry not in entries:
            absent.add(entry)
            items.append(np.zeros((0, width)))
            continue
        features, intervals = entries[entry]
        middle = intervals.mean(1)
        items.append(features[(middle >= start) & (middle < stop)])
    if absent:
        notes.append(f"{name}: {len(absent)} labelled entries are not there")
    check_size(sum(float(item.nbytes) for item in items), file_bytes(path), path, name)
    return sequences(items, path, name, notes, infinite="zero")
