"""The HDF5 files of MFN (Memory Fusion Network): one array a file, named by modality and split.

``{audio|video|text|X|y}_{train|valid|test}[_emb].h5`` in one folder, the array under ``data`` or ``d1``; modalities
[N, 20, D], labels [N] or [N, K]. ``X`` [N, 20, 325] is MOSI's text (300), audio (5) and video (20) side by side. A
modality that has no file for a split is missing in its rows. A single file is read as one modality, or as labels.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from models.data.formats.arrays import SPLIT_CODES, Arrays, Part, offsets_of
from models.data.formats.checks import listed, numbers, require_data
from models.data.formats.hdf5 import read_files
from models.data.formats.repairs import bounds, note_missing

NAME = "mfn"
KEYS = ("data", "d1")
MOSI_WIDTHS = {"text": 300, "audio": 5, "video": 20}
_FILE = re.compile(r"(?P<name>[A-Za-z]+)_(?P<split>train|valid|test)(_emb)?\.h5")


def fits(path: Path) -> bool:
    """A folder with files named as MFN's."""
    return path.is_dir() and any(_FILE.fullmatch(item.name) for item in path.iterdir())


def read(path: str | Path) -> Arrays:
    """Arrays of a folder or of one file. Raises FileNotFoundError, or ValueError naming the file and the key."""
    path = Path(path)
    files = {item: match for item in _files(path) if (match := _FILE.fullmatch(item.name))}
    if not files:
        if path.is_file():
            return _single(path)
        raise ValueError(f"{path} has no files named like audio_train.h5 or y_test.h5")
    arrays: dict[str, dict[str, np.ndarray]] = {}
    notes: list[str] = []
    for (item, match), content in zip(files.items(), read_files(list(files)), strict=True):
        value = numbers(_array(content, item), item, KEYS[0], infinite="zero", notes=notes)
        arrays.setdefault(match["name"], {})[match["split"]] = value
    return joined(path, arrays, notes)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.h5"))
    return [require_data(path)]


def _array(content: dict[str, np.ndarray | list[str]], path: Path) -> np.ndarray:
    for key in KEYS:
        if isinstance(content.get(key), np.ndarray):
            return content[key]  # type: ignore[return-value]
    if len(content) == 1 and isinstance(only := next(iter(content.values())), np.ndarray):
        return only
    raise ValueError(f"{path} has no array 'data' or 'd1'; it has {listed(content)}")


def _single(path: Path) -> Arrays:
    """A file with another name: its only array as a modality, or as labels when it has one column."""
    notes: list[str] = []
    value = numbers(_array(read_files([path])[0], path), path, KEYS[0], infinite="zero", notes=notes)
    result = Arrays(str(path), NAME, notes=notes)
    if value.ndim <= 1:
        result.labels["y"] = value.reshape(-1)
    else:
        whole = _whole(path, path.stem, {"all": value}, {"all": len(value)})
        note_missing(~_present(whole), path.stem, notes)
        result.modalities = _parts({path.stem: whole}, notes)
    return result.check()


def joined(path: Path, arrays: dict[str, dict[str, np.ndarray]], notes: list[str]) -> Arrays:
    """Arrays of ``{name: {split: values}}``; labels under "y". Raises ValueError naming what does not fit."""
    splits = [name for name in ("train", "valid", "test") if any(name in parts for parts in arrays.values())]
    rows = {
        split: _rows(path, {name: parts[split] for name, parts in arrays.items() if split in parts}) for split in splits
    }
    result = Arrays(str(path), NAME, notes=notes)
    result.split = np.concatenate([np.full(rows[split], SPLIT_CODES[split]) for split in splits])
    if "test" not in splits:
        notes.append("there are no test rows")
    labels = arrays.pop("y", None)
    if labels is not None:
        absent = [split for split in splits if split not in labels]
        if absent:
            raise ValueError(f"{path} has no labels y_{absent[0]}.h5")
        result.labels["y"] = np.concatenate([labels[split].reshape(rows[split], -1) for split in splits])
        result.kinds["y"] = "regression"
        if result.labels["y"].shape[1] == 1:
            result.labels["y"] = result.labels["y"][:, 0]
        elif np.isin(result.labels["y"], (0, 1)).all() and (result.labels["y"].sum(1) == 1).all():
            notes.append("y: one-hot rows were read as class numbers")
            result.labels["y"], result.kinds["y"] = result.labels["y"].argmax(1), "classes"
    whole = {}
    for name, parts in _unpacked(arrays).items():
        missing = [split for split in splits if split not in parts]
        if missing:
            notes.append(f"{name}: missing in all {' and '.join(missing)} rows, no file is there")
        whole[name] = _whole(path, name, parts, rows)
        note_missing(~_present(whole[name]) & _has_file(parts, rows), name, notes)
    result.modalities = _parts(whole, notes)
    return result.check()


def _rows(path: Path, found: dict[str, np.ndarray]) -> int:
    sizes = {name: len(value) for name, value in found.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{path}: the files of a split differ in rows: {sizes}")
    return next(iter(sizes.values()))


def _unpacked(arrays: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """``X`` of MOSI's width in its three modalities; everything else as it is."""
    whole = arrays.get("X")
    if whole is None or any(value.ndim != 3 or value.shape[2] != sum(MOSI_WIDTHS.values()) for value in whole.values()):
        return arrays
    ends = np.cumsum(list(MOSI_WIDTHS.values()))
    parts = {
        name: {split: value[:, :, end - width : end] for split, value in whole.items()}
        for (name, width), end in zip(MOSI_WIDTHS.items(), ends, strict=True)
    }
    return {**parts, **{name: value for name, value in arrays.items() if name != "X"}}


def _whole(path: Path, name: str, parts: dict[str, np.ndarray], rows: dict[str, int]) -> np.ndarray:
    """One modality over all splits, zeros where a split has no file."""
    shapes = {value.shape[1:] for value in parts.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) not in (1, 2):
        raise ValueError(f"{path}: {name!r} must be [N, T, D] or [N, D], and equal in all splits; got {listed(shapes)}")
    shape = shapes.pop()
    return np.concatenate([parts.get(split, np.zeros((number, *shape), np.float32)) for split, number in rows.items()])


def _has_file(parts: dict[str, np.ndarray], rows: dict[str, int]) -> np.ndarray:
    return np.concatenate([np.full(number, split in parts) for split, number in rows.items()])


def _present(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.reshape(len(values), -1).any(1))


def _parts(whole: dict[str, np.ndarray], notes: list[str]) -> dict[str, Part]:
    """Modalities without padding: the steps from the first to the last at which any aligned modality is not zero."""
    parts = {}
    for name, values in whole.items():
        present = _present(values)
        if values.ndim == 2:
            parts[name] = Part(values, present=None if present.all() else present)
            continue
        beside = [other for other in whole.values() if other.ndim == 3 and other.shape[1] == values.shape[1]]
        used = np.any([(other != 0).any(2) for other in beside], axis=0)
        start, stop = bounds(used)
        stop = np.where(present, stop, start)
        steps = np.arange(values.shape[1])
        keep = (steps >= start[:, None]) & (steps < stop[:, None])
        parts[name] = Part(values[keep], offsets_of(keep.sum(1)))
    padded = sum(
        int((part.lengths() > 0).sum() * whole[n].shape[1] - part.lengths().sum())
        for n, part in parts.items()
        if part.offsets is not None
    )
    if padded:
        notes.append(
            "steps at which every modality is zero, before the first and after the last word, were cut as padding"
        )
    return parts
