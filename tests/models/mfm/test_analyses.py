"""MFM's analyses: their data has the stated factors, and each analysis writes a JSON file and a figure."""

import json
import math

import pytest
import torch

from models.__main__ import main
from models.analyses import ANALYSES
from models.mfm.analyses import SHOWN, STEPS, paired_digits, timed


@pytest.fixture(autouse=True)
def fast(one_thread):
    pass


def test_the_label_shows_at_the_stated_steps_alone():
    data = timed(400)
    for name, (first, last) in SHOWN.items():
        values = data[name].values.reshape(400, STEPS, 3)
        gap = (values[data.labels == 1].mean(0) - values[data.labels == 0].mean(0)).abs()
        inside = torch.zeros(STEPS, dtype=torch.bool)
        inside[first:last] = True
        assert (gap[inside, 0] > 1.8).all() and (gap[~inside, 0] < 0.1).all() and (gap[:, 1:] < 0.4).all()


def test_paired_digits_share_the_digit_and_no_picture_is_in_two_splits():
    data, negative = paired_digits(500)
    plain, inverted = (data[name].values for name in data.names)
    upright = torch.where(negative[:, None], 1 - inverted, inverted)
    assert torch.equal(inverted.mean(1) > 0.5, negative)
    seen = [{tuple(p.tolist()) for x in (plain, upright) for p in x[data.split == code]} for code in range(3)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    centres = torch.stack([plain[data.labels == d].mean(0) for d in range(10)])
    assert (torch.cdist(upright, centres).argmin(1) == data.labels).float().mean() > 0.8


@pytest.mark.parametrize("name", [name for name in ANALYSES if name.startswith("mfm-")])
def test_an_analysis_writes_its_json_and_its_figure(name, tmp_path, capsys):
    assert main(["analyse", name, "--out", str(tmp_path), "--quick"]) == 0
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert (tmp_path / f"{name}.svg").stat().st_size > 1000
    assert str(next(iter(rows[0]))) in capsys.readouterr().out
