"""Thousands of random calls of the public operators and drop-ins: `python -m tests.hardening.fuzz --calls 2000`.

Every call is compared with the fp64 reference on contiguous copies of the same values (oracle.py). The first failing
call of a family is shrunk and printed.
"""

from __future__ import annotations

import argparse
import sys
import time

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.hardening import families, oracle


def failure(family: str, calls: int, seed: int) -> str | None:
    """The message of a family's first failing call, or None."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=calls,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(families.FAMILIES[family])
    def agrees(call: families.Call) -> None:
        torch.manual_seed(0)
        try:
            oracle.check(call.function, call.tensors, call.floor, call.terms_of_gradients)
        except Exception as error:
            error.add_note(repr(call))
            raise

    try:
        agrees()
    except Exception as error:
        return f"{family}: {type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="of every family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(families.FAMILIES), default=list(families.FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, failed = time.perf_counter(), 0
    for family in options.only:
        found = failure(family, options.calls, options.seed)
        failed += found is not None
        passed = f"{family}: {options.calls} calls, {time.perf_counter() - start:.0f} s"
        print(passed if found is None else found, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
