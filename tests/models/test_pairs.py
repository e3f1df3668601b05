"""The dependency penalty with every base model, on sequences and on words: runs from the command line, and again from
the run's YAML file with the same weights."""

import pytest
import yaml

from models.__main__ import main
from models.data import SOURCES
from models.training.checkpoint import WEIGHTS
from tests.models.helpers import NEED_TEXT, SMALL, mixed

BASES = ("ef-lstm", "lmf", "mfn", "mult", "early-fusion", "late-fusion", "misa", "mmim", "mird", "mfm", *NEED_TEXT)
KINDS = {"sequences": (("frames", "vectors"), "classes"), "words": (("frames", "tokens"), "regression")}


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    names, target = KINDS[request.param]
    monkeypatch.setitem(SOURCES, "synthetic", lambda seed=0: mixed(target, 40).choose(names))
    return request.param


@pytest.mark.parametrize("base", BASES)
def test_the_penalty_runs_around_every_base_from_the_command_line_and_from_yaml(base, kind, tmp_path, capsys):
    if base in NEED_TEXT:
        pytest.importorskip("transformers")
    small = yaml.safe_dump(SMALL[base] | {"name": base}, default_flow_style=True, width=1000).strip()
    changes = (f"model.base={small}", "model.hidden=8", "training={epochs: 1, batch_size: 16}")
    arguments = ["--model", "mdm", "--data", "synthetic", *(part for text in changes for part in ("--set", text))]
    status = main(["fit", *arguments, "--out", str(tmp_path / "first"), "--quiet"])
    if base in NEED_TEXT and kind != "words":
        assert status == 2 and f"{base} needs tokens, data 'mixed' has frames, vectors" in capsys.readouterr().err
        return
    assert status == 0
    settings = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(settings.read_text())["model"]["base"]["name"] == base
    if kind != "words":
        return  # repeating one kind is enough
    assert main(["fit", "--config", str(settings), "--out", str(tmp_path / "second"), "--quiet"]) == 0
    first, second = ((tmp_path / run / WEIGHTS).read_bytes() for run in ("first", "second"))
    assert first == second
