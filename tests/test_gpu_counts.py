"""The committed table of launches, bytes and FLOP is current, and the chunked schedules have the promised costs."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels are interpreted here", allow_module_level=True)

from tests.gpu_counts import CASES, RECORD, count

FOUND = json.loads(RECORD.read_text())
LISTED = [(f"{name}, {b} x {d}", loss, b, d) for name, (loss, sizes) in CASES.items() for b, d in sizes]


@pytest.mark.parametrize("name, loss, batch, width", LISTED, ids=[c[0] for c in LISTED])
def test_the_table_is_what_is_counted_now(name, loss, batch, width):
    assert count(loss, batch, width) == FOUND["now"][name], "python -m tests.gpu_counts --update"


def test_the_table_has_every_case_before_and_now():
    assert FOUND["before"].keys() == FOUND["now"].keys() == {c[0] for c in LISTED}


def test_one_sided_losses_compute_nothing_twice_and_store_only_the_gradients_of_scores():
    for name in ("InfoNCE one-sided, bfloat16, 32768 x 512", "SigLIP, bfloat16, 65536 x 768"):
        batch, width = (int(n) for n in name.rsplit(", ", 1)[1].split(" x "))
        row = FOUND["now"][name]
        assert row["flop"] == 3.0
        slopes, features = 2 * batch**2 / 2**20, 4 * batch * width / 2**20
        # dS is written once and read twice; every chunk of rows reads 16-bit features and reads and writes dy
        assert row["mib"] < 3 * slopes + (6 * batch / 2048 + 30) * features


def test_symmetric_losses_take_their_scores_from_two_passes():
    """One pass computes both log-sum-exps, one computes dS; with the two matmuls that is 4 N FLOP."""
    assert FOUND["now"]["InfoNCE symmetric, bfloat16, 1024 x 512"]["flop"] == 4.0
    assert FOUND["now"]["InfoNCE symmetric, bfloat16, 32768 x 512"]["flop"] == 4.0


def test_stored_layers_take_few_enough_launches_to_fill_a_device():
    row = FOUND["now"]["concat critic InfoNCE, bfloat16, 512 MiB, 4096 x 512"]
    layers = 7 * 2 * 512 * 2 * 4096**2 / 2**20  # h1 and z, written and read forward and backward; D and dh1
    assert row["flop"] == 4.0 and row["mib"] < 1.2 * layers
    assert row["mib"] * 2**20 / row["launches"] > 1e7  # at 5 TB/s, a launch moves memory for at least two microseconds
