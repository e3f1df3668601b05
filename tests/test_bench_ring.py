"""The cost model of the ring schedule: its limits, and the number of rows from which transfers are hidden."""

import pytest

from bench.ring import PAPER_FLOPS, PAPER_LINKS, Block, Link, gather_cost, hidden_from, paper, ring_cost

BLOCK = Block(forward=1.0, backward=3.0, fused=3.0)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_ring_on_a_fast_link_costs_its_blocks_and_on_a_slow_one_its_transfers(world):
    fast, slow = Link(0.0, 1e30), Link(0.0, 1.0)
    assert ring_cost(world, 4, 8, 2, BLOCK, fast).seconds == pytest.approx(4 * world)
    sent = ring_cost(world, 4, 8, 2, BLOCK, slow)
    assert sent.seconds == pytest.approx(sent.link_bytes + BLOCK.forward + BLOCK.backward)
    gathered = gather_cost(world, 4, 8, 2, BLOCK, slow)
    assert gathered.seconds == pytest.approx(gathered.link_bytes + 3 * world)


def test_a_ring_holds_the_same_whatever_the_world():
    few, many = (ring_cost(world, 64, 8, 2, BLOCK, Link(0.0, 1.0)).memory for world in (2, 512))
    assert few == many
    few, many = (gather_cost(world, 64, 8, 2, BLOCK, Link(0.0, 1.0)).memory for world in (2, 512))
    assert many == 256 * few


@pytest.mark.parametrize("name", PAPER_LINKS)
def test_transfers_are_hidden_from_the_number_of_rows_that_is_printed(name):
    bandwidth, width, size = PAPER_LINKS[name].bandwidth, 512, 2
    for rows, flops, numbers in zip(hidden_from(PAPER_FLOPS, bandwidth, size), (2, 6), (size, size + 4), strict=True):
        assert flops * rows**2 * width / PAPER_FLOPS == pytest.approx(rows * width * numbers / bandwidth)


def test_the_table_for_512_gpus_has_both_schedules_on_every_link():
    expected = {(name, schedule) for name in PAPER_LINKS for schedule in ("gather", "ring")}
    assert {(row["link"], row["schedule"]) for row in paper()} == expected
