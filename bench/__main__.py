"""Runs all benchmarks of this folder: `python -m bench run|compare|plot`.

    run [NAME ...] [--quick]      write tables to bench/results/; without a name those of `make bench`
    run --list                    list all tables, their duration on two quiet cores, and their files
    compare BEFORE [AFTER]        paired, interleaved runs of two commits or checkouts; exit status 1 for a regression
    plot                          draw the figures from bench/results/

Arguments after `--` are passed to the table's own command, `python -m bench.NAME`; see its --help.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import NamedTuple

from . import compare
from .machine import RESULTS


class Table(NamedTuple):
    """minutes: duration on two quiet cores. standard: whether `run` without names includes it."""

    summary: str
    minutes: int
    writes: str
    standard: bool = True
    command: tuple[str, ...] = ()
    quick: bool = True  # whether it supports --quick


TABLES = {
    "cpu": Table("InfoNCE beside its floor and rivals", 8, "cpu_info_nce_*.json"),
    "mlp_critic": Table("concat critics", 12, "cpu_mlp_critic*.json"),
    "club": Table("CLUB, MMD and HSIC", 5, "cpu_club.json, cpu_mmd.json, cpu_hsic.json"),
    "losses": Table("the other losses", 4, "cpu_losses.json"),
    "attention": Table("attention", 8, "cpu_attention.json"),
    "lstm": Table("LSTM scans", 10, "cpu_lstm.json"),
    "layers": Table("layers of sequence models", 8, "cpu_layers.json"),
    "steps": Table("training steps of every system, and the share of the losses", 8, "cpu_steps.json"),
    "growth": Table("exponents of time and memory in B, N, D, H and T", 3, "cpu_growth.json"),
    "cases": Table(
        "every case of suite.py under pytest-benchmark", 4, "cases.json", False,
        ("-m", "pytest", "-q", "bench/test_suite.py", f"--benchmark-json={RESULTS / 'cases.json'}"), False,
    ),
    "factorcl": Table("a step of FactorCL-SSL, public formulation and ours", 3, "cpu_factorcl.json", False, (), False),
    "mird": Table(
        "a step of MIRD and the memory of its decoder", 4, "cpu_mird.json", False,
        ("-m", "bench.mird", "--json", str(RESULTS / "cpu_mird.json")), False,
    ),
    "instructions": Table("AVX-512 and AVX2 side by side", 2, "cpu_instructions.json", False, (), False),
    "mi_tasks": Table("estimate_mi on forty tasks, three seeds", 30, "mi_tasks.json", False, (), False),
    "mi_truth": Table(
        "estimate_mi beyond Gaussians", 25, "mi_truth.json", False,
        ("-m", "bench.mi_tasks", "--tasks", "beyond", "--samples", "100", "1000", "10000"), False,
    ),
    "mi_truth_large": Table(
        "the same with 100,000 samples", 30, "mi_truth_large.json", False,
        ("-m", "bench.mi_tasks", "--tasks", "beyond", "--samples", "100000", "--output",
         str(RESULTS / "mi_truth_large.json")), False,
    ),
    "staircase": Table("bounds on the staircase", 60, "staircase.json", False, (), False),
}  # fmt: skip


def run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.list:
        for name, table in TABLES.items():
            print(f"{name:12s} {table.minutes:4d} min  {table.writes:44s} {table.summary}")
        return 0
    names = options.names or [name for name, table in TABLES.items() if table.standard]
    for name in names:
        table = TABLES[name]
        quick = ["--quick"] if options.quick and table.quick else []
        if options.quick and not table.quick:
            print(f"bench run: {name} does not support --quick, skipped", flush=True)
            continue
        print(f"bench run: {name}: {table.summary}", flush=True)
        status = subprocess.run([sys.executable, *(table.command or ("-m", f"bench.{name}")), *quick, *rest]).returncode
        if status:
            print(f"bench run: {name} ended with status {status}")
            return status
    return 0


def plot() -> int:
    for module, arguments in (("bench.plots", ()), ("bench.staircase", ("--figure-only",))):
        status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
        if status:
            return status
    return 0


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="tables, into bench/results/")
    running.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TABLES))
    running.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    running.add_argument("--list", action="store_true")
    comparing = verbs.add_parser(
        "compare", help="compare two commits or checkouts", description=compare.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare.add_arguments(comparing)
    verbs.add_parser("plot", help="draw figures of the stored tables")
    options = parser.parse_args(own)
    if options.verb == "run":
        if unknown := [name for name in options.names if name not in TABLES]:
            running.error(f"NAME must be one of {', '.join(TABLES)}; got {', '.join(unknown)}")
        return run(options, rest)
    return compare.main(options) if options.verb == "compare" else plot()


if __name__ == "__main__":
    sys.exit(main())
