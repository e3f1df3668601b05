"""Draws the figures of the pages from the JSON files of bench/results/.

`python -m bench.plots`: cpu.png, time and memory of InfoNCE by batch size, for README.md; cpu_floor.png, time over the
arithmetic floor of InfoNCE and of a concat critic, for docs/benchmarks.md, both with the machine, the commit and the
date; mird_quirks.png and mdm_robustness.png, the figures of two analyses, for docs/mird.md and docs/mdm.md.
"""

from __future__ import annotations

import textwrap
from typing import Any

from . import machine
from .readme import Row, is_ours, load, setting

SUMMARY, FLOORS = machine.RESULTS / "cpu.png", machine.RESULTS / "cpu_floor.png"
LEAST_MIB = 1.0  # below it the figures are those of the allocator
COLOURS = {
    "mi_kernels": "tab:blue",
    "mi_kernels, scores kept": "tab:cyan",
    "mi_kernels, medium precision": "tab:cyan",
    "mi_kernels, budget 1 MiB": "tab:purple",
    "eager": "tab:red",
    "split first layer, eager": "tab:red",
    "torch.compile": "tab:orange",
    "split first layer, torch.compile": "tab:orange",
    "linear_cross_entropy": "tab:green",
    "linear_cross_entropy, chunked": "tab:olive",
    "info-nce-pytorch": "tab:pink",
    "public formulation": "tab:gray",
}


def _lines(rows: list[Row], value: str) -> dict[str, tuple[list[int], list[float]]]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row.get(value) is not None:
            batches, values = found.setdefault(row["contender"], ([], []))
            batches.append(row["B"])
            values.append(row[value])
    return found


def _draw(axis: Any, title: str, unit: str, rows: list[Row], value: str) -> None:
    for name, (batches, values) in _lines(rows, value).items():
        plain = name == "mi_kernels"
        axis.plot(
            batches, values, marker="o", ms=4, lw=2.5 if plain else 1.2, color=COLOURS.get(name), label=name,
            ls="-" if plain or not is_ours(name) else "--",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(title=title, xlabel="B", ylabel=unit)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    if value == "over_base":
        # Labels at 0.6, 0.8 and 0.9 (and their multiples by ten) would overlap those beside them.
        axis.yaxis.set_minor_formatter(lambda tick, _: f"{tick:g}" if f"{tick:e}"[0] in "23457" else "")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, framealpha=0.6)


def _titled(figure: Any, what: str, result: dict[str, Any]) -> None:
    """A title that wraps within the figure."""
    characters = int(figure.get_figwidth() * 14)
    figure.suptitle("\n".join(textwrap.wrap(f"{what} {setting(result)}.", characters)), fontsize=9)


def summary() -> Any:
    from matplotlib.figure import Figure

    result = load("cpu_info_nce_one_sided")
    rows = [row for row in result["rows"] if row["D"] == 128]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    _draw(time, "time of a step", "milliseconds", rows, "milliseconds")
    large = [row for row in rows if (row["peak_mib"] or 0) >= LEAST_MIB]
    _draw(memory, "memory of a step", "MiB at the peak", large, "peak_mib")
    memory.get_legend().remove()
    _titled(figure, "InfoNCE of B pairs with 128 features, forward plus backward, fp32; lower is better.", result)
    return figure


def floors() -> Any:
    from matplotlib.figure import Figure

    one, both, concat = (load(f"cpu_{name}") for name in ("info_nce_one_sided", "info_nce_symmetric", "mlp_critic"))
    deep = [row for row in concat["rows"] if row["base"] == "3M"]
    shallow = [[row for row in result["rows"] if row["D"] == 128] for result in (one, both)]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw(axes[0, 0], "InfoNCE, one-sided, D = 128", "time over 3N", shallow[0], "over_base")
    _draw(axes[0, 1], "InfoNCE, symmetric, D = 128", "time over 4N", shallow[1], "over_base")
    _draw(axes[1, 0], "concat critic [256, 512, 512, 1]", "time over 3M", deep, "over_base")
    large = [row for row in deep if (row["peak_mib"] or 0) >= LEAST_MIB]
    _draw(axes[1, 1], "concat critic: memory of a step", "MiB at the peak", large, "peak_mib")
    _titled(figure, "Forward plus backward, fp32; lower is better.", one)
    return figure


def analyses() -> list[str]:
    """Draws the figures of the analyses from their tables; the names of the files."""
    from models.mdm.analyses import draw_robustness
    from models.mird.analyses import draw

    names = []
    for name, drawn in (("mird_quirks", draw), ("mdm_robustness", draw_robustness)):
        found = load(name)
        names.append(f"{name}.png")
        drawn(machine.RESULTS / names[-1], found["rows"], found["metric"])
    return names


def main() -> None:
    for path, draw in ((SUMMARY, summary), (FLOORS, floors)):
        draw().savefig(path, dpi=110)
    names = [SUMMARY.name, FLOORS.name, *analyses()]
    print(f"bench.plots: {', '.join(names)} show the figures of bench/results/")


if __name__ == "__main__":
    main()
