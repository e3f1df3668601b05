"""Settings in YAML: unknown names are rejected, omitted settings keep their defaults, and files are read as written."""

import re
from pathlib import Path

import pytest
import yaml

from models.analyses import ANALYSES
from models.registry import MODELS
from models.settings import CONFIGS, dump, from_dict, from_file, known_configs, parse_changes, read, starting_point


def config(**changes):
    return from_dict({"model": {"name": "simclr"}}).changed(changes)


@pytest.mark.parametrize("model", MODELS)
def test_the_settings_of_every_model_come_back_from_their_file(model, tmp_path):
    made = starting_point(model, "digits")
    made.save(tmp_path)
    assert read(tmp_path) == made and made.name == model
    assert from_dict(yaml.safe_load(dump(made))) == made


@pytest.mark.parametrize("name", known_configs())
def test_every_config_of_the_repository_loads_and_names_its_folder(name):
    model, data = name.split("/")
    found = from_file(CONFIGS / f"{name}.yaml")
    assert (found.name, found.data.name) == (model, data)


WRONG = [
    ({"training.epoch": 3}, "no setting training.epoch; did you mean training.epochs?"),
    ({"model.encoder.hiden": 3}, "no setting model.encoder.hiden; did you mean model.encoder.hidden?"),
    ({"modle.encoder": 3}, "no setting modle; did you mean model?"),
    ({"model.xyz": 3}, "no setting model.xyz; known are encoder, temperature"),
    ({"training.epochs": "many"}, "training.epochs must be a whole number, got 'many'"),
    ({"training.epochs": True}, "training.epochs must be a whole number"),
    ({"training.epochs": 0}, "training.epochs must be at least 1"),
    ({"training.lr": "fast"}, "training.lr must be a number"),
    ({"model.encoder": 3}, "model.encoder must hold settings"),
    ({"model.encoder.dropout": 1.5}, "model.encoder.dropout must be a dropout rate"),
    ({"model.name": "bert"}, "model must be one of factorcl-sup"),
    ({"training.corruption.drop": {"a": 2}}, "drop of a must lie"),
    ({"model.name": "mutl"}, "; did you mean mult?"),
    ({"training.device": "cuda"}, "did you mean training.accelerator?"),
    ({"training.learning_rate": 0.1}, "did you mean training.lr?"),
    ({"training.accelerator": "abacus"}, "accelerator must be one of cpu, gpu"),
    ({"training.lr": float("inf")}, "training.lr must be finite"),
    ({"training.clip": float("nan")}, "training.clip must be finite"),
    ({"training.precision": "8"}, "training.precision must be one of"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_setting_is_named_with_what_is_accepted(changes, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        config(**changes)


def test_values_take_the_type_of_their_setting():
    found = config(**parse_changes(["training.lr=1e-3", "data.modalities=left", "training.clip=1"]))
    assert found.training.lr == 0.001 and found.data.modalities == ("left",) and found.training.clip == 1.0
    found = config(**parse_changes(["training.corruption.drop={left: 0.5}", "data.threshold=0"]))
    assert found.training.corruption.drop == {"left": 0.5} and found.data.threshold == 0.0
    assert config(**parse_changes(["training.precision=64"])).training.precision == "64"
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_changes(["training.epochs"])


def test_differences_are_dotted_names():
    other = config(**{"training.lr": 0.5, "model.encoder.hidden": 7})
    assert config().differences(other) == ["model.encoder.hidden", "training.lr"]
    assert config().differences(config()) == []


def test_what_is_no_settings_file_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read(tmp_path)
    with pytest.raises(IsADirectoryError, match="is a folder; a YAML file is needed"):
        from_file(tmp_path)
    path = tmp_path / "config.yaml"
    wrong = {"[1, 2]": "must hold the parts", "x: 1\na: [": "is not YAML: line 2,", "model: {}": "model.name"}
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    path.write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="is not YAML"):
        read(tmp_path)


@pytest.mark.parametrize("room", ["training", "evaluation", "report"])
def test_what_serves_every_model_names_none(room):
    names = "|".join([*MODELS, *(model.replace("-", "_") for model in MODELS), "factorcl", "mird", "mfm", "mdm"])
    for path in (Path(CONFIGS).parent / room).rglob("*.py"):
        found = re.findall(rf"\b({names})\b", path.read_text(), re.IGNORECASE)
        assert not found, (path.name, found)


def test_imports_point_down():
    """Modules import only from lower levels: batch, data, layers, model, systems, registry, training, evaluation,
    report, command line.

    A system's analyses train and evaluate, so they are on the level of the report, not on that of their system.
    """
    rooms = [
        ["batch", "files"],
        ["data"],
        ["layers"],
        ["model"],
        ["baselines"],
        ["factorcl", "mfm", "mird", "mdm"],
        ["registry"],
        ["settings", "training"],
    ]
    rooms += [["evaluation"], ["compare", "report", "demo", "analyses"], ["commands"], ["__main__"]]
    analyses = {function.__module__ for function in ANALYSES.values()}
    level = {name: index for index, names in enumerate(rooms) for name in names}
    root = Path(CONFIGS).parent
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        room = "analyses" if ".".join(("models", *parts)) in analyses else parts[0]
        for name in re.findall(r"^\s*from models\.(\w+)", path.read_text(), re.MULTILINE):
            if room in level and name in level:
                assert level[name] <= level[room], (str(path.relative_to(root)), name)
                assert name == room or level[name] < level[room] or {name, room} == {"settings", "training"}
