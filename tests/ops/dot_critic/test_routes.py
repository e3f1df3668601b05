"""The choice between the two schedules of one-sided 16-bit losses: its rules, its table, and the measuring command."""

from __future__ import annotations

import json

import pytest
import torch

from bench import route
from mi_kernels.ops.common.schedules import SCHEDULES
from mi_kernels.ops.dot_critic import routes

BF16 = torch.bfloat16


def test_the_committed_table_is_well_formed_and_says_where_each_rule_comes_from():
    for rule in routes.load():
        assert rule["source"].startswith(("measured on", "not measured:"))


@pytest.mark.parametrize("arch", [None, (8, 0), (9, 0), (12, 0)])
def test_every_size_has_a_schedule(arch):
    for batch in (1, 300, 2048, 2049, 10**6):
        for depth in (1, 128, 129, 4096):
            assert routes.choose(BF16, batch, batch, depth, arch) in SCHEDULES
    assert routes.choose(BF16, 256, 256, 128, arch) == "fused"
    assert routes.choose(BF16, 256, 256, 129, arch) == "stored"


def test_the_first_rule_that_holds_decides():
    rules = [
        {"architecture": [9, 0], "dtype": "float16", "schedule": "stored", "source": "s"},
        {"pairs_at_least": 100, "features_at_most": 64, "schedule": "stored", "source": "s"},
        {"schedule": "fused", "source": "s"},
    ]
    choose = lambda *a: routes.choose(*a, rules=rules)  # noqa: E731
    assert choose(torch.float16, 1, 1, 999, (9, 0)) == "stored"
    assert choose(torch.float16, 1, 1, 999, (8, 0)) == "fused"
    assert choose(BF16, 10, 10, 64, None) == "stored"
    assert choose(BF16, 9, 11, 64, None) == "fused"
    assert choose(BF16, 10, 10, 65, None) == "fused"


def test_the_environment_overrides(monkeypatch):
    for schedule in SCHEDULES:
        monkeypatch.setenv("MI_KERNELS_SCHEDULE", schedule)
        assert routes.choose(BF16, 10**5, 10**5, 512, (9, 0)) == schedule
    monkeypatch.setenv("MI_KERNELS_SCHEDULE", "fastest")
    with pytest.raises(ValueError, match="MI_KERNELS_SCHEDULE must be one of fused, stored, got 'fastest'"):
        routes.choose(BF16, 1, 1, 1, None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"schedule": "fused", "source": "s", "colour": 1}], "unknown keys"),
        ([{"schedule": "best", "source": "s"}], "needs a schedule"),
        ([{"schedule": "fused"}], "and a source"),
        ([{"schedule": "fused", "source": "s", "pairs_at_least": 3}], "last rule must apply to all cases"),
        ([], "last rule"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, rules, message):
    path = tmp_path / "routes.json"
    path.write_text(json.dumps({"rules": rules}))
    with pytest.raises(ValueError, match=message):
        routes.load(path)


def fake(dtype: str, batch: int, depth: int, schedule: str) -> float:
    """Times in which "stored" wins for at least 256 features at batches from 4096 on, and, as if by chance, at 1024."""
    if schedule == "fused":
        return 1.0
    return 0.5 if depth >= 256 and (batch >= 4096 or batch == 1024) else 2.0


def test_measured_times_become_rules_that_reproduce_them(tmp_path):
    rows = route.table(fake, (1024, 2048, 4096, 8192), (64, 256, 512))
    new = route.rules(rows, [9, 0], "measured on a fake")
    path = tmp_path / "routes.json"
    old = [{"architecture": [9, 0], "schedule": "stored", "source": "old"}, *routes.load()]
    path.write_text(json.dumps({"note": "n", "rules": old}))
    route.write(path, new, [9, 0])
    rules = routes.load(path)
    assert all(rule["source"] != "old" for rule in rules)
    for dtype in (BF16, torch.float16):
        for batch, depth, want in [
            (8192, 64, "fused"), (4096, 256, "stored"), (4096, 65, "stored"), (2048, 512, "fused"),
            (1024, 512, "fused"), (10**5, 4096, "stored"),
        ]:  # fmt: skip
            assert routes.choose(dtype, batch, batch, depth, (9, 0), rules) == want, (batch, depth)
    # the rules of other devices are unchanged
    others = [r for r in routes.load() if r.get("architecture") != [9, 0]]
    assert [r for r in rules if r.get("architecture") != [9, 0]] == others


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_measured_or_changed(monkeypatch, capsys):
    before = routes.PATH.read_text()
    monkeypatch.setattr("sys.argv", ["route", "--write"])
    assert route.main() == 2
    assert "nothing is measured" in capsys.readouterr().err
    assert routes.PATH.read_text() == before
