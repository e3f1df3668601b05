"""Our own ``.npz``: what a user saves with ``np.savez``, and what ``convert`` writes. Read without pickle.

| key | what |
|---|---|
| ``NAME`` | vectors [N, D], sequences [N, T, D], or with ``off_NAME`` frames [sum T, D] or integer tokens [sum T] |
| ``off_NAME`` | integers [N + 1]; a row of length 0 does not have the modality |
| ``len_NAME`` | integers [N], for padded sequences [N, T, D]: their steps; a row of 0 does not have the modality |
| ``present_NAME`` | bool [N]: False where the row does not have the modality, whatever its values |
| ``shape_NAME`` | (height, width) of pictures [N, height, width] or [N, D]; frames [sum T, height, width] need none |
| ``table_NAME``, ``words_NAME`` | embeddings [V, E] and the words of tokens |
| ``y`` | [N] or [N, K]; classes where all are whole numbers, else a regression target; NaN: no label |
| ``label``, ``labels``, ... | the labels, where there is no ``y`` (see LABELS) |
| ``y_OTHER`` | another label, chosen with ``target`` |
| ``kind``, ``kind_OTHER`` | "classes" or "regression", where whole numbers are a regression target |
| ``classes``, ``classes_OTHER`` | names [C] of the classes |
| ``split`` | [N], 0 train, 1 valid, 2 test, -1 unused; drawn where it is absent. ``split_OTHER``: another one |
| ``ids``, ``groups`` | a name, and what a row belongs to, [N] |
| ``text_NAME`` | strings [N], used as tokens when ``NAME`` is asked for |
| ``notes`` | strings: what ``convert`` repaired |
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays, Part, codes, offsets_of, strings
from models.data.formats.checks import listed, numbers
from models.data.formats.npy import read_npz
from models.data.formats.repairs import pictures, vectors

NAME = "npz"
LABELS = ("y", "label", "labels", "target", "targets", "class", "regression_labels", "classification_labels")
_PREFIXES = ("off_", "len_", "present_", "shape_", "table_", "words_", "kind_", "classes_", "text_", "y_", "split_")
_KEYS = ("split", "kind", "classes", "class_names", "ids", "id", "groups", "notes")


def fits(path: Path) -> bool:
    return path.suffix == ".npz"


def read(path: str | Path) -> Arrays:
    """Arrays of one file. Raises FileNotFoundError, or ValueError naming the file and the key."""
    arrays = read_npz(path)
    result = Arrays(str(path), NAME)
    if "notes" in arrays:
        result.notes += strings(arrays["notes"].reshape(-1), path, "notes")
    rest = _labels(arrays, result)
    names = [
        key
        for key, value in arrays.items()
        if key not in rest and key not in _KEYS and not key.startswith(_PREFIXES) and value.dtype.kind in "fiub"
        and (value.ndim in (2, 3, 4) or f"off_{key}" in arrays)
    ]  # fmt: skip
    for key in names:
        result.modalities[key] = _part(arrays, key, path, result.notes)
    _describing(arrays, result, path)
    known = {*rest, *names, *_KEYS, *(prefix + key for prefix in _PREFIXES for key in (*names, *rest))}
    unused = [
        key for key in arrays if key not in known and not key.startswith(("text_", "y_", "split_", "kind_", "classes_"))
    ]
    if unused:
        result.notes.append(f"not used: {listed(unused)}{_reason(arrays[unused[0]], unused[0])}")
    orphans = [key for key in arrays if key.startswith("off_") and key[4:] not in names]
    if orphans:
        raise ValueError(f"{path} has {orphans[0]!r} but no array {orphans[0][4:]!r} of numbers")
    return result.check()


def _reason(values: np.ndarray, key: str) -> str:
    """Why an array that looks like a modality is none; empty where it does not look like one."""
    if values.dtype.kind in "SU" and not key.startswith(_PREFIXES):
        return " (texts are read from text_NAME)"
    if key.startswith(_PREFIXES) or values.dtype.kind not in "fiubc":
        return ""
    if values.dtype.kind == "c":
        return f" ({key} is complex; store real and imaginary parts side by side)"
    hint = "; lengths of padded sequences are read from len_NAME" if "len" in key.lower() else ""
    return f" (a modality is [N, D] or [N, T, D]; {key} is {list(values.shape)}{hint})"


def _labels(arrays: dict[str, np.ndarray], result: Arrays) -> list[str]:
    """Fills in the labels; returns the keys that they came from."""
    found = [key for key in LABELS if key in arrays]
    if len(found) > 1 and found[0] != "y":
        raise ValueError(f"{result.path} must have its labels under 'y': it has {listed(found)}")
    used = found[:1]
    for key in used + [key for key in arrays if key.startswith("y_")]:
        name = key.removeprefix("y_")
        result.labels[name], classes = _label(arrays[key], result.path, key)
        own = "" if key in used else f"_{name}"
        kind = arrays.get(f"kind{own}")
        if kind is not None:
            result.kinds[name] = str(kind)
        named = arrays.get(f"classes{own}", arrays.get("class_names") if not own else None)
        if classes or named is not None:
            result.classes[name] = classes or tuple(strings(named.reshape(-1), result.path, f"classes{own}"))  # type: ignore[union-attr]
    if used and used[0] != "y":
        result.notes.append(f"the labels are under {used[0]!r}")
    return found if found[:1] == ["y"] else used


def _label(values: np.ndarray, path: str, key: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels [N] or [N, K], and names of the classes where they are strings."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2):
        raise ValueError(f"{path}: {key!r} must be [N] or [N, K], got {values.shape}")
    if values.dtype.kind in "SU" and values.ndim == 1:
        names, numbered = np.unique(strings(values, path, key), return_inverse=True)
        return numbered.astype(np.int64), tuple(str(name) for name in names)
    if values.dtype.kind in "iub":
        return values.astype(np.int64), ()
    return numbers(values, path, key, nan="keep"), ()


def _part(arrays: dict[str, np.ndarray], name: str, path: str | Path, notes: list[str]) -> Part:
    """Modality ``name``; checks shapes, offsets, lengths and which rows have it."""
    values, offsets = arrays[name], arrays.get(f"off_{name}")
    if offsets is not None:
        part = _ragged(values, offsets, arrays, name, path, notes)
        present = _present(arrays, name, path, len(part))
        return part if present is None else _without(part, present)
    present, shape = _present(arrays, name, path, len(values)), _shape(arrays, name, path)
    if values.ndim == 3 and shape is None:
        return _padded(values, arrays.get(f"len_{name}"), present, name, path)
    if f"len_{name}" in arrays:
        raise ValueError(f"{path}: len_{name} must belong to sequences [N, T, D], but {name!r} is {values.shape}")
    if present is not None:  # what a missing row holds, such as NaN, does not matter
        values = np.where(present.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    if shape is not None:
        return replace(_pictures(values, shape, name, path, notes), present=present)
    if values.ndim == 2:
        return vectors(numbers(values, path, name), name, notes, present)
    raise ValueError(
        f"{path}: modality {name!r} must be [N, D], [N, T, D] or ragged with off_{name}; got {values.shape}"
    )


def _present(arrays: dict[str, np.ndarray], name: str, path: str | Path, rows: int) -> np.ndarray | None:
    present = arrays.get(f"present_{name}")
    if present is not None and (present.dtype.kind != "b" or present.shape != (rows,)):
        raise ValueError(f"{path}: present_{name} must be bool [{rows}], got {present.dtype} {present.shape}")
    return present


def _without(part: Part, present: np.ndarray) -> Part:
    """Ragged sequences without the frames of the rows that are not present."""
    lengths = part.lengths()
    kept = part.values[np.repeat(present, lengths)]
    return replace(part, values=kept, offsets=offsets_of(lengths * present))


def _padded(
    values: np.ndarray, stated: np.ndarray | None, present: np.ndarray | None, name: str, path: str | Path
) -> Part:
    """Sequences [N, T, D], cut to their lengths; what the padding holds does not matter."""
    rows, steps, _ = values.shape
    lengths = np.full(rows, steps)
    if stated is not None:
        if stated.dtype.kind not in "iu" or stated.shape != (rows,):
            raise ValueError(f"{path}: len_{name} must be integers [{rows}], got {stated.dtype} {stated.shape}")
        if rows and not 0 <= int(stated.min()) <= int(stated.max()) <= steps:
            found = f"{stated.min()} to {stated.max()}"
            raise ValueError(f"{path}: len_{name} must lie between 0 and {steps}, the steps of {name!r}; got {found}")
        lengths = stated.astype(np.int64)
    if present is not None:
        lengths = lengths * present
    within = np.arange(steps) < lengths[:, None]
    whole = bool(within.all())
    frames = numbers(values if whole else np.where(within[..., None], values, 0), path, name)
    return Part(frames.reshape(-1, values.shape[2]) if whole else frames[within], offsets_of(lengths))


def _ragged(
    values: np.ndarray,
    offsets: np.ndarray,
    arrays: dict[str, np.ndarray],
    name: str,
    path: str | Path,
    notes: list[str],
) -> Part:
    _check_offsets(offsets, values, name, path)
    offsets = offsets.astype(np.int64)
    stated = arrays.get(f"len_{name}")
    if stated is not None and not np.array_equal(stated, np.diff(offsets)):
        raise ValueError(f"{path}: len_{name} and off_{name} disagree")
    if values.ndim == 1:
        return _tokens(values, offsets, arrays, name, path)
    if values.ndim == 3:
        part = pictures(values, path, name, notes)
        return Part(part.values, offsets, part.shape)
    shape = _shape(arrays, name, path)
    if shape is not None:
        return Part(_pictures(values, shape, name, path, notes).values, offsets, shape)
    return Part(numbers(values, path, name), offsets)


def _tokens(
    values: np.ndarray, offsets: np.ndarray, arrays: dict[str, np.ndarray], name: str, path: str | Path
) -> Part:
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: ragged modality {name!r} must be frames [sum T, D] or integer tokens, got {values.dtype}"
        )
    table, words = arrays.get(f"table_{name}"), arrays.get(f"words_{name}")
    if table is not None:
        table = numbers(table, path, f"table_{name}")
    if int(values.min()) < 0 or int(values.max()) >= (2**31 if table is None else len(table)):
        known = "0 and 2^31" if table is None else f"0 and {len(table) - 1}, the rows of table_{name}"
        raise ValueError(f"{path}: tokens {name!r} must lie between {known}; got {values.min()} to {values.max()}")
    return Part(
        values.astype(np.int64),
        offsets,
        table=table,
        words=() if words is None else tuple(strings(words, path, f"words_{name}")),
    )


def _check_offsets(offsets: np.ndarray, values: np.ndarray, name: str, path: str | Path) -> None:
    if values.ndim not in (1, 2, 3) or len(values) == 0:
        raise ValueError(f"{path}: ragged modality {name!r} must be [sum T, D], got {values.shape}")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise ValueError(f"{path}: off_{name} must be integers [N + 1], got {offsets.dtype} {offsets.shape}")
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(
            f"{path}: off_{name} must run from 0 to {len(values)}, it runs from {offsets[0]} to {offsets[-1]}"
        )
    if (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{path}: off_{name} must not decrease")


def _shape(arrays: dict[str, np.ndarray], name: str, path: str | Path) -> tuple[int, int] | None:
    shape = arrays.get(f"shape_{name}")
    if shape is None:
        return None
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 1).any() or (shape > 2**20).any():
        raise ValueError(f"{path}: shape_{name} must be the height and width of pictures, got {str(shape)[:60]}")
    return int(shape[0]), int(shape[1])


def _pictures(values: np.ndarray, shape: tuple[int, int], name: str, path: str | Path, notes: list[str]) -> Part:
    given = values.shape[1:]
    if given not in (shape, (shape[0] * shape[1],)):
        swapped = " (height and width are swapped)" if given == shape[::-1] else ""
        raise ValueError(f"{path}: shape_{name} is {shape}, but the pictures {name!r} are {given}{swapped}")
    return pictures(values.reshape(len(values), *shape), path, name, notes)


def _describing(arrays: dict[str, np.ndarray], result: Arrays, path: str | Path) -> None:
    """Splits, ids, groups and texts."""
    for key, value in arrays.items():
        if key.startswith("text_"):
            result.texts[key.removeprefix("text_")] = strings(value, path, key)
        elif key.startswith("split_"):
            result.splits[key.removeprefix("split_")] = _split(value, path, key)
    if "split" in arrays:
        result.split = _split(arrays["split"], path, "split")
    for key in ("ids", "id"):
        if key in arrays:
            result.ids = tuple(strings(arrays[key], path, key))
    if "groups" in arrays:
        result.groups = codes(strings(arrays["groups"], path, "groups"))


def _split(values: np.ndarray, path: str | Path, key: str) -> np.ndarray:
    if values.ndim != 1 or values.dtype.kind not in "iufb" or not np.isin(values, (-1, 0, 1, 2)).all():
        raise ValueError(
            f"{path}: {key} must be [N] with codes 0 train, 1 valid, 2 test, -1 unused; got {values.shape}"
        )
    return values.astype(np.int64)


def write(arrays: Arrays, path: str | Path) -> None:
    """Writes everything that ``read`` reads, compressed; the file appears when it is complete."""
    content: dict[str, np.ndarray] = {}
    taken = (*LABELS, *_KEYS)
    for name, part in {**arrays.modalities, **arrays.optional}.items():
        key = f"{name}_modality" if name in taken or name.startswith(_PREFIXES) else name
        content[key] = part.values
        extra = {
            "off": part.offsets,
            "present": part.present,
            "shape": None if part.shape is None else np.array(part.shape),
            "table": part.table,
            "words": np.array(part.words) if part.words else None,
        }
        content.update({f"{prefix}_{key}": value for prefix, value in extra.items() if value is not None})
    for i, (name, values) in enumerate(arrays.labels.items()):
        content["y" if i == 0 else f"y_{name}"] = values
        own = "" if i == 0 else f"_{name}"
        if name in arrays.classes:
            content[f"classes{own}"] = np.array(arrays.classes[name])
        if name in arrays.kinds:
            content[f"kind{own}"] = np.array(arrays.kinds[name])
    content.update({f"text_{name}": np.array(texts) for name, texts in arrays.texts.items()})
    content.update({f"split_{name}": values for name, values in arrays.splits.items()})
    rest = {"split": arrays.split, "ids": np.array(arrays.ids) if arrays.ids else None, "groups": arrays.groups}
    content.update({name: value for name, value in rest.items() if value is not None})
    if arrays.notes:
        content["notes"] = np.array(arrays.notes)
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            np.savez_compressed(file, **content)  # type: ignore[arg-type]
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
