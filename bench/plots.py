"""Draws bench/results/cpu.png from the JSON files beside it: time over the arithmetic floor, and peak memory, by batch.

`python -m bench.plots`. The figure names the machine, the commit and the date of what it shows.
"""

from __future__ import annotations

from typing import Any

from . import machine
from .readme import Row, is_ours, load, setting

FIGURE = machine.RESULTS / "cpu.png"
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
        axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, framealpha=0.6)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    one, both, concat = (load(f"cpu_{name}") for name in ("info_nce_one_sided", "info_nce_symmetric", "mlp_critic"))
    deep = [row for row in concat["rows"] if row["base"] == "3M"]
    shallow = [[row for row in result["rows"] if row["D"] == 128] for result in (one, both)]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
    _draw(axes[0, 0], "InfoNCE, one-sided, D = 128", "time over 3N", shallow[0], "over_base")
    _draw(axes[0, 1], "InfoNCE, symmetric, D = 128", "time over 4N", shallow[1], "over_base")
    _draw(axes[1, 0], "concat critic [256, 512, 512, 1]", "time over 3M", deep, "over_base")
    large = [row for row in deep if (row["peak_mib"] or 0) >= 1]
    _draw(axes[1, 1], "concat critic: memory of a step", "MiB at the peak", large, "peak_mib")
    figure.suptitle(f"Forward plus backward, fp32; lower is better. {setting(one)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)
    print(f"bench.plots: {FIGURE.name} shows the figures of bench/results/")


if __name__ == "__main__":
    main()
