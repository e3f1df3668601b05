"""The measured sections with the times of the systems' training steps and of the drop-ins."""

from __future__ import annotations

from typing import Any

from .readme_parts import load, paragraph, setting, table

BASES = {"mfn": "MFN", "mfn, small batch": "MFN", "mult": "MulT"}
SHARES = {"plain": "plain formulation", "ours, negatives 1": "1", "ours, negatives 0.25": "1/4",
          "ours, negatives 0.125": "1/8 (the default)"}  # fmt: skip


def _times_faster(row: dict[str, Any]) -> str:
    """The base's median time over the row's, and between which quartiles of the row's it lies."""
    low, high = (1 / quartile for quartile in reversed(row["quartiles"]))
    return f"{1 / row['over_base']:.1f} ({low:.1f} to {high:.1f})"


def steps() -> list[str]:
    """The training step of each system compared with the public formulation of the same step."""
    lines = []
    for name in ("cpu_factorcl", "cpu_mfm"):
        public = {}
        for row in load(name)["rows"]:
            size = ", ".join(f"{k} = {row[k]}" for k in ("B", "T") if k in row)
            if row["contender"] == row["base"]:
                public[size] = row["peak_mib"]
                continue
            what = row["contender"].removeprefix("mi_kernels").removeprefix(", ")
            label = row["loss"].removesuffix(" step") + (f", {what}" if what else "")
            lines.append(f"{label} | {size} | {_times_faster(row)} | {row['peak_mib']:.0f} / {public[size]:.0f}")
    mird = load("cpu_mird")
    step = mird["step"]
    words = f"B = {step['sizes']['batch']}, {step['sizes']['words']} words"
    lines.append(f"MIRD | {words} | {step['times_faster']:.1f} | -")
    return [
        *paragraph(
            "A training step (loss, backward, optimiser) compared with the public formulation of the same step in",
            "eager torch. Both have the same weights, and their losses are checked to be equal before timing. The",
            f"table shows the ratio of medians, with the quartiles of our side. {setting(load('cpu_factorcl'))};",
            "MIRD used one thread.",
        ),
        *table("step | size | times faster | MiB, ours / public", lines),
    ]


def all_systems() -> list[str]:
    """A training step of every model beside the same model on plain torch operators."""
    result = load("cpu_steps")
    lines = []
    for row in result["rows"]:
        if row["contender"] != "mi_kernels" or row["base"] != "plain torch operators":
            continue
        shares = [f"{100 * row[name]:.0f} %" for name in ("share_of_losses", "share_of_layers")]
        peak = row.get("of_fp32_peak")
        rate = "-" if peak is None else f"{100 * peak:.0f} %"
        lines.append(" | ".join([row["loss"], str(row["B"]), _times_faster(row), *shares, rate]))
    return [
        *paragraph(
            "A training step of each model beside the same model with every operator of mi_kernels in plain torch. The",
            "shares are parts of our step's time. The last column compares the matrix products of the plain form per",
            "second with the peak rate of fp32 multiply-adds: 100 % is the arithmetic floor; more is possible where",
            f"our operators need fewer products. {setting(result)}.",
        ),
        *table("model | B | times faster | in losses | in sequence layers | of the fp32 peak", lines),
    ]


def growth() -> list[str]:
    """Exponents of time and memory."""
    result = load("cpu_growth")
    lines = []
    for row in result["rows"]:
        memory = row["exponent_of_memory"]
        sizes = f"{row['dimension']} = {row['sizes'][0]} to {row['sizes'][-1]}"
        lines.append(f"{row['case']} | {sizes} | {row['exponent']:.2f} | {'-' if memory is None else f'{memory:.2f}'}")
    return [
        *paragraph(
            "How time and peak memory of a forward and backward pass grow: exponents over the upper half of the sizes.",
            f"A dash stands for memory below 1 MiB. {setting(result)}.",
        ),
        *table("operator | sizes | exponent of time | exponent of memory", lines),
    ]


def penalties() -> list[str]:
    """Time that the dependency penalty adds to a step of its base."""
    result = load("cpu_mdm")
    lines = []
    for row in result["rows"]:
        base, flop = row["gflop"]["base"], row["gflop"]
        added = [f"{100 * row['added'][kind]:.0f} / {100 * (flop[kind] / base - 1):.0f}" for kind in SHARES]
        sizes = row["sizes"]
        rate = f"{100 * row['of_fp32_peak']['base']:.0f} %"
        lines.append(" | ".join([f"{BASES[row['base']]}, B = {sizes['batch']}, T = {sizes['steps']}", *added, rate]))
    return [
        *paragraph(
            "Time that the dependency penalty of MDM (KL, one critic step) adds to a step of its base, by the number",
            "of shuffled rows per row, in per cent: added time / added matrix products (the arithmetic floor). The",
            "plain formulation uses one shuffled row per row. The last column compares the base's matrix products per",
            f"second with the peak rate of fp32 multiply-adds. {setting(result)}.",
        ),
        *table(" | ".join(["base", *SHARES.values(), "base, of the fp32 peak"]), lines),
    ]


def decoder() -> list[str]:
    result = load("cpu_mird")
    found, step = result["text_decoder"], result["step"]
    peak, flop, rate = found["peak_mib"], step["gflop"], step["of_fp32_peak"]
    return paragraph(
        f"MIRD's step has {flop['ours']:.0f} GFLOP of matrix products, the public formulation {flop['public']:.0f};",
        f"they run at {100 * rate['ours']:.0f} % and {100 * rate['public']:.0f} % of the fp32 peak rate.",
        f"MIRD's text decoder at B = {found['batch']}, T = {found['steps']} adds {peak['ours']:.0f} MiB; storing all",
        f"logits adds {peak['plain']:.0f} MiB.",
    )


def drop_ins() -> list[str]:
    """Time of each drop-in over that of its original, by batch size."""
    result = load("cpu_dropins")
    by_loss: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_loss.setdefault(row["loss"], {})[row["batch"]] = row
    sizes, later = sorted({row["batch"] for row in result["rows"]}), _later(result["rows"])

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "ours_over_theirs" not in row:
            return "-"
        ratio = row["ours_over_theirs"]
        value = f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"
        return f"**{value}**" if row["interval"][0] > 1 else value

    lines = [" | ".join([name, *(cell(found.get(b)) for b in sizes)]) for name, found in by_loss.items()]
    return [
        *paragraph(
            "Time of the drop-in divided by the time of the original, for value and gradients: medians of alternating",
            "runs on one thread. Bold means slower: the whole 95 % interval is above 1. A dash means not measured,",
            f"because the original takes too long or too much memory. {setting(result)}{later}.",
        ),
        *table(" | ".join(["loss", *(f"B = {b}" for b in sizes)]), lines),
    ]


def _later(rows: list[dict[str, Any]]) -> str:
    """Names the commits of rows that were timed again later."""
    commits = sorted({row["commit"] for row in rows if "commit" in row})
    return f"; {sum('commit' in row for row in rows)} rows at {' and '.join(commits)}" if commits else ""


def instructions() -> list[str]:
    """Time over that of the plain torch definition, with AVX-512 and approximately restricted to AVX2."""
    result = load("cpu_instructions")
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_case.setdefault(row["case"], {})[row["instructions"]] = row
    labels = list(next(iter(by_case.values())))
    lines = []
    for case, found in by_case.items():
        cells = [f"{found[label]['over_reference']:.2f}" for label in labels]
        slower = found[labels[1]]["milliseconds"] / found[labels[0]]["milliseconds"]
        lines.append(" | ".join([case, *cells, f"{slower:.1f}"]))
    return [
        *paragraph(
            "The same processor in two configurations: with AVX-512, and with torch, MKL and oneDNN restricted to AVX2",
            "and our own matrix products instead of oneDNN's. Our elementwise loops still use AVX-512, so the second",
            "configuration only approximates an AVX2 processor (`python -m bench run instructions`).",
            f"{setting(result)}.",
        ),
        *table(" | ".join(["time over plain torch definition", *labels, "our time: AVX2 over AVX-512"]), lines),
    ]
