"""Every case of suite.py under pytest-benchmark: `python -m bench run cases`, or `pytest bench/test_suite.py`."""

from __future__ import annotations

import pytest

from bench import suite


@pytest.mark.parametrize("name", list(suite.cases()))
def test_case(name: str, benchmark) -> None:
    benchmark.group = name.partition("/")[0]
    benchmark(suite.cases()[name]())
