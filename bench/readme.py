"""Rewrites the measured sections of docs/ from the JSON files in bench/results/: `python -m bench.readme`.

A section stands between two markers. In a row, every contender except ours is a rival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from . import machine, readme_evidence, readme_systems
from .readme_parts import load, paragraph, setting, table

HEADER = "case | base | mi_kernels | best rival | floor"
FIGURES = (
    "loss", "contender", "milliseconds", "base", "base_milliseconds", "over_base", "quartiles", "peak_mib",
    "repetitions", "gflops", "of_fp32_peak",
)  # fmt: skip
ROOT = machine.RESULTS.parent.parent
Row = dict[str, Any]


def by_size(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[k]) for k in keys), {})[row["contender"]] = row
    return found


def is_ours(name: str) -> bool:
    return name.startswith("mi_kernels")


def best_rival(rows: dict[str, Row]) -> str:
    name, row = min(((n, r) for n, r in rows.items() if not is_ours(n)), key=lambda item: item[1]["over_base"])
    return f"{row['over_base']:.2f} ({name})"


def ours(rows: dict[str, Row]) -> str:
    """Our figure, bold where no rival is faster."""
    shown = cell(rows, "mi_kernels")
    faster = [r for n, r in rows.items() if not is_ours(n) and r["over_base"] <= rows["mi_kernels"]["over_base"]]
    return shown if [r for r in faster if "matmul" not in r["contender"]] else f"**{shown}**"


def cell(rows: dict[str, Row], name: str, digits: int = 2) -> str:
    return f"{rows[name]['over_base']:.{digits}f}" if name in rows else "-"


def mib(rows: dict[str, Row], name: str) -> str:
    found = rows.get(name, {}).get("peak_mib")
    return "-" if found is None else f"{found:.0f}"


def info_nce() -> list[str]:
    results = [load(f"cpu_info_nce_{kind}") for kind in ("one_sided", "symmetric")]
    lines = []
    for result in results:
        for (loss, b, d), rows in by_size(result["rows"], "loss", "B", "D").items():
            sizes = f"{mib(rows, 'mi_kernels')} / {mib(rows, 'eager')}"
            lines.append(f"{loss} | {b} | {d} | {ours(rows)} | {best_rival(rows)} | {cell(rows, 'eager')} | {sizes}")
    return [
        *paragraph(
            f"InfoNCE, forward plus backward, fp32, {setting(results[0])}. Times are multiples of the floor, which is",
            "3N for the one-sided and 4N for the symmetric loss. N is the time of one `torch.matmul` of the same shape",
            "in the same run. MiB is the additional memory of a step at its peak.",
        ),
        *table("loss | B | D | mi_kernels | best rival | eager | MiB, ours / eager", lines),
    ]


def concat() -> list[str]:
    result = load("cpu_mlp_critic")
    lines = []
    for (b, critic), rows in by_size(result["rows"], "B", "critic").items():
        first = next(iter(rows.values()))
        cells = [ours(rows), cell(rows, "mi_kernels, medium precision"), best_rival(rows)]
        cells += [cell(rows, "public formulation"), f"{mib(rows, 'mi_kernels')} / {mib(rows, 'public formulation')}"]
        lines.append(f"{critic} | {b} | {first['base']} | " + " | ".join(cells))
    groups = [
        f"B = {b}: {rows['one call']['over_base']:.2f}"
        for (b,), rows in by_size(load("cpu_mlp_critic_groups")["rows"], "B").items()
    ]
    return [
        *paragraph(
            "InfoNCE with a concat critic, forward plus backward with gradients of inputs and parameters,",
            f"{setting(result)}. Times are multiples of the base: 3M, where M is the time of one `torch.matmul` of",
            "2 B^2 H^2 FLOP in the same run, or the fastest implementation in eager torch.",
        ),
        *table("critic | B | base | mi_kernels | 16-bit tiles | best rival | public | MiB, ours / public", lines),
        f"Time of one grouped call of six critics over that of six separate calls: {', '.join(groups)}.",
        "",
        *budgets(),
    ]


def budgets() -> list[str]:
    rows = load("cpu_mlp_critic_memory")["rows"]
    kept = ", ".join(f"{r['peak_mib']:.0f} MiB under a budget of {r['budget_mib']} MiB" for r in rows)
    return paragraph(
        f"At B = {rows[0]['B']} a step with the two-layer critic adds {kept}; storing the activations of all pairs",
        f"would take {rows[0]['activations_mib']} MiB.",
    )


def moments() -> list[str]:
    results = [load("cpu_club"), load("cpu_mmd"), load("cpu_hsic")]
    lines = []
    for result in results:
        for (loss, b, d), rows in by_size(result["rows"], "loss", "B", "D").items():
            base = next(iter(rows.values()))["base"]
            public = cell(rows, "public formulation, B x B x D")
            rivals = {name: row for name, row in rows.items() if name != base or "matmul" not in base}
            lines.append(f"{loss} | {b} | {d} | {base} | {ours(rows)} | {best_rival(rivals)} | {public}")
    return [
        *paragraph(
            f"CLUB, squared MMD and HSIC, forward and backward, {setting(results[0])}. Times are multiples of the base."
        ),
        *table("loss | B | D | base | mi_kernels | best rival | public, B x B x D", lines),
    ]


def other_losses() -> list[str]:
    result = load("cpu_losses")
    lines = []
    for (loss, b, d), rows in by_size(result["rows"], "loss", "B", "D").items():
        sizes = f"{mib(rows, 'mi_kernels')} / {mib(rows, 'eager')}"
        base = next(iter(rows.values()))["base"]
        cells = [base, ours(rows), best_rival(rows), cell(rows, "eager"), sizes]
        lines.append(" | ".join([loss, b, d, *cells]))
    return [
        *paragraph(
            f"The other losses on dot-product scores, forward plus backward, fp32, {setting(result)}. Times are",
            "multiples of the base.",
        ),
        *table("loss | B | D | base | mi_kernels | best rival | eager | MiB, ours / eager", lines),
    ]


def sequences() -> list[str]:
    """Attention and the layers built on it, case by case."""
    found = []
    for name, title in (
        ("cpu_attention", "Attention: the six directed pairs of MulT at its sizes, and single pairs"),
        ("cpu_layers", "Layers of sequence models, all with the same weights"),
    ):
        result, lines, cases = load(name), [], {}
        for row in result["rows"]:
            label = " ".join([row["loss"], *(f"{k}={v}" for k, v in row.items() if k not in FIGURES)])
            cases.setdefault((label, row["base"]), {})[row["contender"]] = row
        for (label, base), rows in cases.items():
            rivals = {n: r for n, r in rows.items() if n != "floor"}
            if "mi_kernels" in rows and not all(is_ours(n) for n in rivals):
                lines.append(" | ".join([label, base, ours(rivals), best_rival(rivals), cell(rows, "floor")]))
        about = f"{title}. Forward plus backward, fp32, {setting(result)}. Times are multiples of the base."
        found += [*paragraph(about), *table(HEADER, lines)]
    return found


def recurrent() -> list[str]:
    """Time of each rival over that of the LSTM scan: the range over all sizes of one width."""
    result = load("cpu_lstm")
    speeds: dict[tuple[str, str], dict[str, list[float]]] = {}
    for rows in by_size((r for r in result["rows"]), "loss", "B", "T", "H").values():
        mine = rows["mi_kernels"]
        of_width = speeds.setdefault((mine["loss"], str(mine["H"])), {})
        for name, row in rows.items():
            if not is_ours(name):
                of_width.setdefault(name.removesuffix(", packed"), []).append(row["over_base"] / mine["over_base"])
    rivals = ("nn.LSTM", "LSTMCell loop", "LSTMCell loop, torch.compile")
    shown = lambda v: f"{min(v):.2f} to {max(v):.2f}" if v else "-"  # noqa: E731
    lines = [" | ".join([*key, *(shown(found.get(rival, [])) for rival in rivals)]) for key, found in speeds.items()]
    return [
        *paragraph(
            "Time of the rivals over that of `lstm` or `lstm_decode`, including the input projection, forward plus",
            f"backward, B = 32 and 128, T = 20 to 400, {setting(result)}. A range covers all B and T.",
        ),
        *table("case | H | nn.LSTM | LSTMCell loop | LSTMCell loop, torch.compile", lines),
    ]


def low_precision() -> list[str]:
    speeds = [row["speed_over_fp32"] for row in load("cpu_info_nce_low_precision")["rows"]]
    return paragraph(
        '16-bit tiles (`torch.set_float32_matmul_precision("medium")`, or bf16 inputs) run InfoNCE',
        f"{min(speeds):.1f} to {max(speeds):.1f} times as fast as fp32 on this processor. Nothing has been timed on a",
        "GPU yet; the Triton kernels pass their tests in the interpreter and compile.",
    )


LABELS = {
    "linear": "logistic regression on the inputs",
    "untrained": "the encoders, untrained",
    "simclr": "SimCLR",
    "supcon": "SupCon",
    "cross-self": "Cross+Self",
    "factorcl-sup": "FactorCL-SUP",
    "factorcl-ssl": "FactorCL-SSL",
}


def accuracies() -> list[str]:
    results = {name: load(f"factorcl_{name}")["summary"] for name in ("utd_mhad", "synthetic")}
    found = {(d, r["model"], r["representation"]): r for d, rows in results.items() for r in rows}
    lines = []
    for model, label in LABELS.items():
        for part, suffix in (("input", ""), ("encoder", ""), ("full", ", its factors")):
            cells = [found.get((data, model, part)) for data in results]
            if any(cells):
                shown = [f"{c['mean']:.3f} ± {c['deviation']:.3f}" if c else "-" for c in cells]
                lines.append(" | ".join([label + suffix, *shown]))
    return table("test accuracy | UTD-MHAD | synthetic", lines)


def estimators() -> list[str]:
    totals = load("mi_tasks")["totals"]
    missed = [f"`{row['task']}`" for row in totals["tasks"] if row["covered"] < 0.5]
    return paragraph(
        "Measured on forty distributions with known mutual information (N = 10,000, half of them held out, three",
        f"seeds, defaults of `estimate_mi`): the mean absolute error is {totals['mae']:.3f} nats, and",
        f"{100 * totals['coverage']:.0f} % of the 95 % intervals contain the truth.",
        *([f"Most intervals miss it on {' and '.join(missed)}, which the critic cannot fit."] if missed else []),
    )


def truths() -> list[str]:
    """Beyond the forty: bias and root-mean-square error by task and number of samples."""
    results = [load("mi_truth"), load("mi_truth_large")]
    rows = {(row["task"], row["samples"]): row for result in results for row in result["totals"]["tasks"]}
    tasks, sizes = (list(dict.fromkeys(key[k] for key in rows)) for k in (0, 1))

    def cell(row: dict[str, Any] | None) -> str:
        return "-" if row is None else f"{row['bias']:+.2f} ({row['rmse']:.2f})"

    lines = []
    for task in tasks:
        found = [rows.get((task, n)) for n in sizes]
        truth = next(row["truth"] for row in found if row)
        lines.append(" | ".join([f"`{task}`", f"{truth:.2f}", *map(cell, found)]))
    by = [row for result in results for row in result["by_samples"]]
    coverage = [" - " if row["coverage"] is None else f"{100 * row['coverage']:.0f} %" for row in by]
    lines.append(" | ".join(["95 % intervals that contain the truth", "", *coverage]))
    lines.append(" | ".join(["mean absolute error", "", *(f"{row['mae']:.3f}" for row in by)]))
    runs = sorted({row["runs"] for row in rows.values()})
    return [
        *paragraph(
            "Beyond Gaussians: pairs of images of the same digit (pooled, or with the class flipped with a given",
            "probability), mixtures, and discrete beside continuous variables. Bias and, in parentheses,",
            f"root-mean-square error in nats over {' or '.join(map(str, runs))} seeds; half of the N samples are held",
            "out; coverage counts the runs that are not at the ceiling of the bound. A dash: MNIST has fewer pictures.",
        ),
        *table(" | ".join(["pair", "truth", *(f"N = {n:,}" for n in sizes)]), lines),
    ]


SHOWN_LEVELS = (2, 6, 10)
KINDS = {  # of curves that are no registered bound; without clipping SMILE is Donsker-Varadhan
    "smile-1": "neither",
    "smile-5": "neither",
    "smile-inf": "lower",
}


def staircase() -> list[str]:
    """Bias, standard deviation and cost of every bound at three levels of mutual information."""
    from mi_kernels.bounds import registry

    result = load("staircase")
    rows = [row for row in result["rows"] if row["data"] == "gaussian"]
    lines = []
    for row in rows:
        levels = {level["truth"]: level for level in row["levels"]}
        shown = [levels[truth] for truth in SHOWN_LEVELS]
        biases = [f"{level['bias']:+.2f}" for level in shown]
        deviations = [f"{level['variance'] ** 0.5:.2f}" for level in shown]
        cost = 1e3 * row["processor_seconds"] / (len(levels) * row["steps"])
        name = row["estimator"]
        kind = KINDS.get(name) or registry.find(name).kind
        trained = "itself" if row["trained_by"] == name else f"`{row['trained_by']}`"
        lines.append(" | ".join([f"`{name}`", kind, trained, *biases, *deviations, f"{cost:.1f}"]))
    at = [f"{{}} at {truth}" for truth in SHOWN_LEVELS]
    header = ["bound", "kind", "critic trained by", *(a.format("bias") for a in at), *(a.format("sd") for a in at)]
    steps = rows[0]["steps"]
    return [
        *paragraph(
            "The data are Gaussians of 20 dimensions whose mutual information rises in steps to 10 nats. A separable",
            f"critic is trained for {steps} steps per level on new batches of 64. Bias and standard deviation (sd) are",
            "in nats, over the values of single batches in the second half of a level. The cost is the time of a",
            "training step in milliseconds, including the values of all bounds that share the critic; the critic's",
            f"networks take most of it. {setting(result)}.",
        ),
        *table(" | ".join([*header, "ms per step"]), lines),
    ]


Section = tuple[Callable[[], list[str]], ...]
PAGES: dict[str, dict[str, Section]] = {
    "docs/choosing.md": {"staircase table": (staircase,), "estimator table": (estimators,), "truth table": (truths,)},
    "docs/factorcl.md": {
        "term table": (readme_evidence.factorcl_terms,),
        "information table": (readme_evidence.factorcl_information,),
        "search table": (
            partial(readme_evidence.factorcl_search, "two-digit"),
            partial(readme_evidence.factorcl_search, "two-digit-small"),
            partial(readme_evidence.factorcl_search, "synthetic-gaussian"),
        ),
    },
    "docs/mfm.md": {
        "analysis table": (readme_evidence.mfm,),
        "real-data table": (partial(readme_evidence.systems, "mfm"),),
    },
    "docs/mird.md": {
        "quirk table": (
            partial(readme_evidence.quirks, "mird_quirks"),
            partial(readme_evidence.quirks, "mird_quirks_mustard"),
        ),
        "label table": (readme_evidence.mird_labels,),
        "text table": (partial(readme_evidence.systems, "mird"),),
    },
    "docs/mdm.md": {"robustness table": (readme_evidence.robustness,), "evidence table": (readme_evidence.mdm,)},
    "docs/drop-ins.md": {"drop-in table": (readme_systems.drop_ins,)},
    "docs/benchmarks.md": {
        "step table": (
            readme_systems.steps,
            readme_systems.all_systems,
            readme_systems.penalties,
            readme_systems.decoder,
        ),
        "growth table": (readme_systems.growth,),
        "instruction table": (readme_systems.instructions,),
        "benchmark table": (info_nce, low_precision, other_losses, concat, moments, sequences, recurrent),
        "accuracy table": (accuracies,),
    },
}


def rewritten(page: str, text: str, sections: dict[str, Section]) -> str:
    """The text of a page with new content between its markers. Raises ValueError if a marker is missing."""
    for name, builders in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise ValueError(f"{page} must hold the markers {begin} and {end}")
        before, after = text.split(begin)[0], text.split(end)[1]
        lines = [line for section in builders for line in section()]
        text = before + begin + "\n\n" + "\n".join(lines) + "\n" + end + after
    return text


def main() -> None:
    for page, sections in PAGES.items():
        path = ROOT / page
        path.write_text(rewritten(page, path.read_text(), sections))
    print(f"bench.readme: {', '.join(PAGES)} hold the figures of bench/results/")


if __name__ == "__main__":
    main()
