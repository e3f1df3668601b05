"""Seconds a training step of every system: compiled operators against plain torch and against the public formulation.

`python -m bench.steps [--quick] [--only mfm ...]` writes bench/results/cpu_steps.json. Plain torch is the same model
with every operator of mi_kernels on the reference backend, which materialises scores and steps LSTMs in Python, as
public code does; where bench/ has the public formulation itself (FactorCL-SSL and MIRD), a row says so.
`share_of_losses` is the part of our step that runs in the operators of losses and bounds, `share_of_layers` in those of
sequence layers. gflops counts the matrix products of the plain torch form, forward and backward.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mi_kernels as mk

from . import machine, peak, suite, table

NOTE = __doc__.split("\n\n")[1].replace("\n", " ") + f"; {table.COLUMNS}"
OF_LOSSES = ("dot_critic", "mlp_critic", "club", "rbf")
OF_LAYERS = ("lstm", "cross_attention")
PLAIN = "plain torch operators"


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Parts of a step's time in operators of the package, by torch's profiler."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    events = found.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    part = lambda words: sum(  # noqa: E731
        e.self_cpu_time_total for e in events if e.key.startswith("mi_kernels") and any(w in e.key for w in words)
    )
    return {"share_of_losses": round(part(OF_LOSSES) / total, 3), "share_of_layers": round(part(OF_LAYERS) / total, 3)}


def check(system: str, rows: int = 12) -> None:
    """Raises RuntimeError unless both backends have the same loss on the same weights and the same random numbers."""
    found = []
    for backend in (None, "reference"):
        model, _ = suite.training(system, rows)
        batch = suite.data_for(system, rows).batch(torch.arange(rows))
        batch = batch._replace(views=tuple(batch.inputs for _ in range(model.views))) if model.views else batch
        torch.manual_seed(0)
        with mk.use_backend(backend):
            found.append(float(model.phases()[0].loss(batch).total.detach()))
    if abs(found[0] - found[1]) > 1e-3 * (1 + abs(found[1])):
        raise RuntimeError(f"{system}: the backends have different losses, {found}; no time is taken")


def measure(system: str, rows: int, seconds: float) -> list[dict[str, Any]]:
    check(system)
    ours, plain = suite.training(system, rows)[1], suite.training(system, rows)[1]

    def reference() -> None:
        with mk.use_backend("reference"):
            plain()

    arms, flop = {PLAIN: reference, "mi_kernels": ours}, peak.products(plain)
    found = table.rows(system, {"B": rows}, arms, PLAIN, seconds, least=3, flop=flop)
    found[-1] |= shares(ours)
    return found


def public(seconds: float, quick: bool) -> list[dict[str, Any]]:
    """The two systems whose public formulation is written out."""
    from . import factorcl, mird

    factorcl.check()
    batch = factorcl.synthetic_batch(32 if quick else 256)
    steps = {
        factorcl.PUBLIC: factorcl.public_step(factorcl.model(), batch),
        "mi_kernels": factorcl.our_step(factorcl.model(), batch),
    }
    found = table.rows("factorcl-ssl", {"B": len(batch.rows)}, steps, factorcl.PUBLIC, seconds, least=3)
    found[-1] |= shares(steps["mi_kernels"])
    if quick:
        return found
    try:
        timed = mird.timed(5)
    except ModuleNotFoundError as error:
        table.left_out("mird", {"B": mird.SIZES["batch"]}, "public", error)
        return found
    base = timed["median_seconds"]["public"]
    for name, value in timed["median_seconds"].items():
        found.append({"loss": "mird", "B": mird.SIZES["batch"], "contender": name, "base": "public",
                      "milliseconds": round(1e3 * value, 3), "over_base": round(value / base, 4)})  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, nothing is written")
    parser.add_argument("--only", nargs="+", choices=[*suite.SYSTEMS, "public"], default=[*suite.SYSTEMS, "public"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="per system")
    options = parser.parse_args(arguments)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    seconds, rows = (0.1, 8) if options.quick else (options.seconds, options.rows)
    found = [row for name in options.only if name != "public" for row in measure(name, rows, seconds)]
    if "public" in options.only:
        found += public(seconds, options.quick)
    if not options.quick and set(options.only) == {*suite.SYSTEMS, "public"}:
        machine.write("cpu_steps", found, NOTE)
    print("bench.steps: done")


if __name__ == "__main__":
    main()
