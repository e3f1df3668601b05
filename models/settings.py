"""The settings of a run: a YAML file with the keys model, data and training, which determine the result.

    model: {name: mult, sizes: {layers: 3}}
    data: {name: utd-mhad}
    training: {epochs: 20, lr: 0.001}

Every part is a frozen dataclass. Omitted keys keep their defaults; unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from models.data import DataConfig
from models.files import replace_file
from models.model import Nested
from models.registry import MODELS, entry
from models.training.config import TrainingConfig

CONFIGS = Path(__file__).parent / "configs"
FILE = "config.yaml"
# Names of these settings in other libraries, for suggestions in error messages.
OTHER_NAMES = {
    "device": "accelerator",
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "batch": "batch_size",
    "gradient_clip_val": "clip",
    "dataset": "name",
    "path": "name",
}


@dataclass(frozen=True)
class RunConfig:
    """name: of the model, a key of the registry; model: its settings."""

    name: str
    model: Any
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def seed(self) -> int:
        return self.training.seed

    def to_dict(self) -> dict[str, Any]:
        parts = {"model": self.model, "data": self.data, "training": self.training}
        plain = {name: _plain(part) for name, part in parts.items()}
        plain["model"] = {"name": self.name} | plain["model"]
        return plain

    def flat(self) -> dict[str, Any]:
        """All settings by dotted name."""
        return dict(_flat(self.to_dict()))

    def changed(self, changes: Mapping[str, Any]) -> RunConfig:
        """A copy with some settings changed, by dotted name (see ``_set``). Raises ValueError for unknown names or
        values."""
        tree = self.to_dict()
        for name, value in changes.items():
            _set(tree, name, value)
        return from_dict(tree)

    def save(self, folder: Path) -> None:
        def write(beside: Path) -> None:
            beside.write_text(dump(self))

        replace_file(folder / FILE, write)

    def differences(self, other: RunConfig) -> list[str]:
        """Dotted names of the settings that differ."""
        mine, theirs = self.flat(), other.flat()
        return [name for name in {**mine, **theirs} if mine.get(name, ...) != theirs.get(name, ...)]


def dump(config: RunConfig) -> str:
    return yaml.safe_dump(config.to_dict(), sort_keys=False, width=120)


def read(folder: Path) -> RunConfig:
    """The settings in the folder of a run. Raises FileNotFoundError, or ValueError for an invalid file."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: no such file: {path}")
    return from_file(path)


def from_file(path: Path) -> RunConfig:
    return from_dict(tree_of(path))


def tree_of(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read by the safe loader."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a YAML file is needed, such as {path / FILE}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold the parts model, data and training")
    return tree


def _yaml_problem(error: Exception) -> str:
    """Describes a YAML error with its line."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return what if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {what}"


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Raises ValueError that names an unknown key and the closest known one, or a value of the wrong type."""
    _check_keys(tree, ("model", "data", "training"), "")
    model = dict(_part(tree, "model"))
    if "name" not in model:
        raise ValueError("model.name is missing")
    name = model.pop("name")
    return RunConfig(
        name,
        _build(entry(name).settings, model, "model."),
        _build(DataConfig, _part(tree, "data"), "data."),
        _build(TrainingConfig, _part(tree, "training"), "training."),
    )


def starting_point(model: str, data: str) -> RunConfig:
    """The settings of configs/MODEL/DATA.yaml if it exists; otherwise the defaults, with the training settings of any
    other model on that data."""
    entry(model)
    path = CONFIGS / model / f"{data}.yaml"
    if path.is_file():
        return from_file(path)
    return from_dict({"model": {"name": model}, "data": {"name": data}})


def known_configs() -> list[str]:
    """The names MODEL/DATA of all files in configs/."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml"))


def parse_changes(assignments: Iterable[str]) -> dict[str, Any]:
    """Converts ["training.epochs=3"] to {"training.epochs": 3}; values are YAML. Raises ValueError without an "="."""
    changes = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"settings are changed with NAME=VALUE, such as training.epochs=3; got {text!r}")
        changes[name] = parse_value(value, name)
    return changes


def parse_value(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {name} is not YAML: {text!r}") from error


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = tree.get(name) or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} must hold settings as KEY: VALUE, got {part!r}")
    return part


def _check_keys(given: Iterable[Any], known: Sequence[str], prefix: str) -> None:
    for key in given:
        if key not in known:
            close = [OTHER_NAMES.get(str(key), "")] if OTHER_NAMES.get(str(key)) in known else []
            close = close or _inside(str(key), known) or difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"there is no setting {prefix}{key}; {hint}")


def _inside(key: str, known: Sequence[str]) -> list[str]:
    """Completes names without a part: epochs -> training.epochs."""
    if "training" not in known:
        return []
    parts = (("training", TrainingConfig), ("data", DataConfig))
    names = {f.name: f"{part}.{f.name}" for part, kind in parts for f in dataclasses.fields(kind)}
    found = names.get(OTHER_NAMES.get(key, key))
    return [found] if found else []


def _build(kind: Any, given: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    _check_keys(given, [f.name for f in dataclasses.fields(kind)], prefix)
    values = {name: _value(hints[name], value, prefix + name) for name, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _value(hint: Any, value: Any, name: str) -> Any:
    """Converts ``value`` to the type of a setting: lists to tuples, integers to floats, and 1e-3 (a string in YAML) to
    a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _of_union(arguments, value, name)
    if hint is Nested:
        return _nested({"name": value} if isinstance(value, str) else value, name)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must hold settings as KEY: VALUE, got {value!r}")
        return _build(hint, value, name + ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            value = [value]
        return tuple(_value(arguments[0], item, name) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be KEY: VALUE pairs, got {value!r}")
        return {str(key): _value(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            pass
        else:
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {value!r}")
            return number
    elif type(value) is hint:
        return value
    elif hint is str and type(value) is int:
        return str(value)  # YAML reads the word 32 of precision=32 as a number
    elif hint is str and value is None:
        return ""  # what YAML makes of nothing, as in data.tokenizer=
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def _nested(value: Any, name: str) -> Nested:
    if isinstance(value, Nested):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"{name} must be a model's name or its settings with a name, got {value!r}")
    rest = {key: item for key, item in value.items() if key != "name"}
    return Nested(value["name"], _build(entry(value["name"], name).settings, rest, name + "."))


def _of_union(kinds: Sequence[Any], value: Any, name: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _value(kind, value, name)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Nested):
        return {"name": value.name} | _plain(value.settings)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    """Changes one setting in place. A mapping changes several, as in training={epochs: 3, lr: 0.1}. A nested model that
    is given by its name takes settings; another name drops those of the model before."""
    *path, last = name.split(".")
    place: Any = tree
    for depth, key in enumerate((*path, last)):
        if depth == 0:
            _check_keys([key], ("model", "data", "training"), "")
        if not isinstance(place, dict):
            raise ValueError(f"there is no setting {name}: {'.'.join(path[:depth])} holds no others")
        if depth < len(path):
            inside = place.setdefault(key, {})
            if isinstance(inside, str) and inside in MODELS:
                inside = place[key] = {"name": inside}
            place = inside
    if last == "name" and len(path) > 1 and place.get(last) in MODELS and place[last] != value:
        place.clear()
    if isinstance(value, Mapping) and isinstance(place.get(last), Mapping):
        for key in sorted(value, key=lambda key: key != "name"):  # the name first: it may drop what stands beside it
            _set(tree, f"{name}.{key}", value[key])
    else:
        place[last] = value
