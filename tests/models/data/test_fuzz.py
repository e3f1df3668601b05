"""Reads a few mutated files of every format, in a worker process that may crash or hang; ``fuzz`` reads many."""

import os

import pytest

from tests.models.data.fuzz import fuzz, mutate
from tests.models.data.writers import WRITERS

COUNT = 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker is forked")
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "csd folder"])
def test_mutated_files_are_read_or_refused_in_one_sentence(name):
    ends = fuzz(name, COUNT, first=1_000_000)
    assert sum(ends.values()) == COUNT
    assert not [end for end in ends if "FAILED" in end], ends
    assert any(end.startswith("refused") for end in ends), ends


def test_a_mutation_depends_on_its_seed_alone():
    data = bytes(range(256)) * 4
    assert mutate(data, 5) == mutate(data, 5) != data
