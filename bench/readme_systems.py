"""The measured sections about the systems' training steps and about the drop-ins."""

from __future__ import annotations

from typing import Any

from .readme_parts import load, paragraph, setting, table

BASES = {"mfn": "MFN", "mfn, small batch": "MFN", "mult": "MulT"}
SHARES = {"plain": "plain formulation", "ours, negatives 1": "1", "ours, negatives 0.25": "1/4 (the default)",
          "ours, negatives 0.125": "1/8"}  # fmt: skip


def steps() -> list[str]:
    """A training step of a system beside the public formulation of the same step."""
    lines = []
    for name in ("cpu_factorcl", "cpu_mfm"):
        public = {}
        for row in load(name)["rows"]:
            size = ", ".join(f"{k} = {row[k]}" for k in ("B", "T") if k in row)
            if row["contender"] == row["base"]:
                public[size] = row["peak_mib"]
                continue
            low, high = (1 / quartile for quartile in reversed(row["quartiles"]))
            what = row["contender"].removeprefix("mi_kernels").removeprefix(", ")
            label = row["loss"].removesuffix(" step") + (f", {what}" if what else "")
            times = f"{1 / row['over_base']:.1f} ({low:.1f} to {high:.1f})"
            lines.append(f"{label} | {size} | {times} | {row['peak_mib']:.0f} / {public[size]:.0f}")
    mird = load("cpu_mird")
    step = mird["step"]
    words = f"B = {step['sizes']['batch']}, {step['sizes']['words']} words"
    lines.append(f"MIRD | {words} | {step['times_faster']:.1f} | -")
    return [
        *paragraph(
            "A training step (loss, backward, optimiser) beside the public formulation of the same step in eager",
            "torch: same weights, and equal losses before anything is timed. Times faster: the ratio of medians, with",
            f"the quartiles of our side. {setting(load('cpu_factorcl'))}; MIRD on one thread.",
        ),
        *table("step | size | times faster | MiB, ours / public", lines),
    ]


def penalties() -> list[str]:
    """What the dependency penalty adds to a step of its base."""
    rows = load("cpu_mdm")["rows"]
    lines = []
    for row in rows:
        added = [f"{100 * row['added'][kind]:.0f} %" for kind in SHARES]
        sizes = row["sizes"]
        lines.append(" | ".join([f"{BASES[row['base']]}, B = {sizes['batch']}, T = {sizes['steps']}", *added]))
    return [
        *paragraph(
            "What the dependency penalty of MDM (KL, one critic step) adds to a step of its base, by the number of",
            "shuffled rows per row; the plain formulation passes as many as rows.",
        ),
        *table(" | ".join(["base", *SHARES.values()]), lines),
    ]


def decoder() -> list[str]:
    found = load("cpu_mird")["text_decoder"]
    peak = found["peak_mib"]
    return paragraph(
        f"MIRD's text decoder at B = {found['batch']}, T = {found['steps']} adds {peak['ours']:.0f} MiB; with all",
        f"logits in memory it adds {peak['plain']:.0f} MiB.",
    )


def drop_ins() -> list[str]:
    """Ours over the original, by batch size."""
    result = load("cpu_dropins")
    by_loss: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_loss.setdefault(row["loss"], {})[row["batch"]] = row
    sizes = sorted({row["batch"] for row in result["rows"]})

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "ours_over_theirs" not in row:
            return "-"
        ratio = row["ours_over_theirs"]
        value = f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"
        return f"**{value}**" if row["interval"][0] > 1 else value

    lines = [" | ".join([name, *(cell(found.get(b)) for b in sizes)]) for name, found in by_loss.items()]
    return [
        *paragraph(
            "Time of ours over that of the original, value and gradients, medians of alternating turns on one thread.",
            "Bold: slower, the whole 95 % interval above 1. A dash: not measured, since the original takes too long or",
            f"too much memory. {setting(result)}.",
        ),
        *table(" | ".join(["loss", *(f"B = {b}" for b in sizes)]), lines),
    ]


def instructions() -> list[str]:
    """Ours over the plain torch definition, with AVX-512 and with what comes near an AVX2 processor."""
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
            "The same processor with AVX-512 and with torch, MKL and oneDNN held to AVX2 and our own products in place",
            "of oneDNN's; our elementwise loops keep AVX-512, so this comes near an AVX2 processor and is none",
            f"(`python -m bench run instructions`). {setting(result)}.",
        ),
        *table(" | ".join(["ours over the plain torch definition", *labels, "our time, second over first"]), lines),
    ]
