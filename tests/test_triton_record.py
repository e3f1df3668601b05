"""The committed record of every compiled Triton kernel covers the oldest and newest supported Triton and has no spills.

`python -m tests.triton_checks --compile` compares the record with the kernels as the installed Triton compiles them
now.
"""

from __future__ import annotations

import os
import re

import pytest

from mi_kernels.backends import TRITON_OLDEST
from tests import triton_checks

FOUND = triton_checks.recorded()


def _end(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".")[:2])


def test_the_oldest_supported_triton_and_a_newer_one_are_recorded():
    oldest, newest = sorted(map(_end, FOUND))
    assert oldest == TRITON_OLDEST < newest


def test_both_ends_compile_the_same_kernels():
    first, second = (set(kernels) for kernels in FOUND.values())
    assert first == second and len(first) > 300


@pytest.mark.parametrize("version", FOUND)
def test_no_kernel_spills_or_needs_more_shared_memory_than_there_is(version):
    assert triton_checks.complaints(FOUND[version]) == []


def test_every_kernel_of_the_record_is_one_that_is_compiled_now():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("kernels are interpreted here")
    names = {triton_checks.name_of(job) for job in triton_checks.jobs()}
    for version, kernels in FOUND.items():
        assert set(kernels) <= names, version
    families = {re.split(r"[ /]", name)[0] for name in names}
    assert families == {re.split(r"[ /]", name)[0] for name in next(iter(FOUND.values()))}


def test_headline_kernels_multiply_with_wgmma_on_hopper():
    for version, kernels in FOUND.items():
        used = {name.removesuffix("/sm_90"): row["products"] for name, row in kernels.items() if "products" in row}
        assert used == dict.fromkeys(triton_checks.HEADLINES, "wgmma"), version


def test_a_spill_too_much_shared_memory_and_slow_products_are_complaints():
    fine = {"registers": 9, "stack": 0, "local": 0, "spill_bytes": 0, "shared": 1024, "products": "wgmma"}
    assert triton_checks.complaints({"a/sm_90": fine}) == []
    for fault in ({"spill_bytes": 8}, {"stack": 8}, {"shared": 2**20}, {"products": "mma"}):
        assert len(triton_checks.complaints({"a/sm_90": fine | fault})) == 1
