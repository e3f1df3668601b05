"""The measured sections with the accuracies of the systems and their baselines: means and deviations over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .readme_parts import load, paragraph, setting, table

Row = dict[str, Any]


def _seeds(rows: dict[str, Row]) -> str:
    return " or ".join(sorted({row["seeds"] for row in rows.values()}))


def _probes(what: str, rows: dict[str, Row]) -> list[str]:
    """Probes on inputs, on untrained encoders, and on the encoders and factors of each of ``what``."""
    untrained = next(row for row in rows.values() if "untrained test" in row)
    lines = [f"linear model of the inputs | {rows['linear']['input test']} | {rows['linear']['input valid']} | "]
    lines.append(f"encoders, untrained | {untrained['untrained test']} | {untrained['untrained valid']} | ")
    for name, row in rows.items():
        if name != "linear":
            lines.append(f"{name} | {row['encoder test']} | {row['encoder valid']} | {row.get('full test', '')}")
    return table(f"{what} | test, encoders | validation | test, factors", lines)


def factorcl_terms() -> list[str]:
    """FactorCL-SSL with one term removed at a time, and with the terms of the unique factors alone."""
    rows: dict[str, Row] = load("factorcl_terms_synthetic_gaussian")["summary"]
    return [
        *paragraph(
            "Accuracy of linear probes on `synthetic-gaussian`, whose label depends on unique latents alone: 407",
            f"training steps, no search, {_seeds(rows)} seeds.",
        ),
        *_probes("variant", rows),
    ]


def factorcl_information() -> list[str]:
    """The probe of Table 1: nats of every group of latents in every representation."""
    found = load("factorcl_information")
    latents = [key for key in found["rows"][0] if key not in ("model", "representation")]
    lines = [
        " | ".join([row["model"], row["representation"], *(f"{round(row[key], 1) + 0.0:.1f}" for key in latents)])
        for row in found["rows"]
    ]
    return [
        *paragraph(
            "Estimated I(Z; w) in nats on `synthetic-gaussian`, one seed: w1 and w2 are the latents that are unique to",
            "the first and the second view, and `shared` those of both. The estimator cannot exceed",
            f"{found['ceiling']:.1f} nats. {setting(found)}.",
        ),
        *table(" | ".join(["model", "Z", *latents]), lines),
    ]


def factorcl_search(data: str) -> list[str]:
    """FactorCL and its contrastive baselines, each with the best of its trials on validation rows."""
    found = load(f"factorcl_search_{data.replace('-', '_')}")
    rows: dict[str, Row] = found["summary"]
    trials = max(len(runs) for name, runs in found["runs"].items() if name.endswith(", search"))
    return [
        *paragraph(
            f"`{data}`: {trials} trials per model on the validation rows of a seed that is not reported, then",
            f"{_seeds(rows)} seeds. Accuracy of linear probes.",
        ),
        *_probes("model", rows),
    ]


def mird_labels() -> list[str]:
    """MIRD and its baselines by share of the labels."""
    found = load("mird_utd_mhad_labels")["summary"]
    shares = sorted({row["labels"] for row in found})
    arms = list(dict.fromkeys(row["arm"] for row in found))
    by = {(row["arm"], row["labels"]): row for row in found}
    lines = []
    for arm in arms:
        cells = []
        for share in shares:
            row = by.get((arm, share))
            cells.append(_gain(row) if row and " minus " in arm else _cell(row))
        lines.append(" | ".join([arm, *cells]))
    return table(" | ".join(["test accuracy", *(f"{100 * share:.0f} % of the labels" for share in shares)]), lines)


def _gain(row: Row) -> str:
    """A difference paired by seed, and the p-value of its t-test if there is one."""
    p = row.get("p")
    shown = "" if p is None else " (p < 0.001)" if p < 0.001 else f" (p = {p:.3f})"
    return f"{row['mean']:+.3f} ± {row['deviation']:.3f}{shown}"


def _cell(row: Row | None) -> str:
    return f"{row['mean']:.3f} ± {row['deviation']:.3f}" if row else ""


DATA = {
    "mmmo": "ICT-MMMO",
    "utd-mhad": "UTD-MHAD",
    "mosi": "MOSI",
    "mosi-vectors": "MOSI, vectors of the ACL 2017 release",
    "mosi-heldout": "MOSI, the same vectors on held-out rows",
    "mustard": "MUStARD",
}
BASES = {"mfn": "MFN", "mult": "MulT", "lmf": "LMF"}
METRICS = {"mae": "the mean absolute error (mae); lower is better", "accuracy": "the accuracy; higher is better"}


def _unfinished(cases: Iterable[str]) -> list[str]:
    """Names the cases whose runs are not all there."""
    names = list(cases)
    return paragraph(f"Not finished, and therefore without a table: {'; '.join(names)}.") if names else []


def _mdm_name(case: str) -> str:
    data, _, base = case.rpartition("-")
    return f"{DATA[data]}, {BASES[base]}"


def mdm() -> list[str]:
    """A section for every case whose runs are all there, in the order of the study; names the others."""
    from .mdm_evidence import CASES

    found = load("mdm_evidence")["summary"]
    lines = [line for case in CASES if case in found for line in _mdm_case(case, found[case])]
    return lines + _unfinished(_mdm_name(case) for case in CASES if case not in found)


def _mdm_case(case: str, found: Row) -> list[str]:
    """One row per arm: the metric, its gain over weight 0 paired by seed, and the metric with each modality damaged."""
    metric = found["metric"]
    kinds = [(name, kind) for name, by in found["rows"][0]["damaged"].items() for kind in by]
    second = ["accuracy_2"] if "accuracy_2" in found["rows"][0] else []
    lines = []
    for row in found["rows"]:
        cells = [*(_cell(row.get(name)) for name in (metric, *second)), _gain(row["gain"]) if "gain" in row else ""]
        damaged = [_cell(row["damaged"].get(name, {}).get(kind)) for name, kind in kinds]
        lines.append(" | ".join([row["arm"], *cells, *damaged]))
    header = ["arm", metric, *second, "gain over weight 0", *(f"{name}: {kind}" for name, kind in kinds)]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in found["weights"].items())
    return [
        f"### {_mdm_name(case)}",
        "",
        *paragraph(
            f"The metric is {METRICS[metric]}. Chosen on validation rows: learning rate {found['lr']:g}; weights",
            f"{weights}. {found['rows'][0]['seeds']} seeds. {_verdict(found)}",
        ),
        *table(" | ".join(header), lines),
    ]


def _verdict(found: Row) -> str:
    """Which measures differ from weight 0, with Bonferroni's correction for the number of measures."""
    gains = {row["arm"]: row["gain"] for row in found["rows"] if row["arm"] in found["weights"]}
    corrected = {arm: min(1.0, len(gains) * gain.get("p", 1.0)) for arm, gain in gains.items()}
    better = [arm for arm, p in corrected.items() if p < 0.05 and gains[arm]["mean"] > 0]
    worse = [arm for arm, p in corrected.items() if p < 0.05 and gains[arm]["mean"] < 0]
    least = f"p = {min(corrected.values()):.3f} for the nearest, corrected for {len(gains)} measures"
    if not better and not worse:
        return f"**No measure differs significantly from weight 0** ({least})."
    parts = [f"{' and '.join(arms)} {how}" for arms, how in ((better, "gain"), (worse, "lose")) if arms]
    return f"**Significantly different from weight 0: {'; '.join(parts)}** ({least})."


def _sizes(found: Row) -> str:
    """The data, rows, epochs and seeds of an analysis."""
    config, sizes = found["config"], found["sizes"]
    training = f"{config['training']['epochs']} epochs in batches of {config['training']['batch_size']}"
    names = ", ".join(config["data"]["modalities"])
    data = DATA[config["data"]["name"]] + (f" ({names})" if names else "")
    return f"{data}, {sizes['train']} training and {sizes['test']} test rows, {training}, {sizes['seeds']} seeds"


def robustness() -> list[str]:
    """The metric on damaged test rows, by measure and for the best single modality."""
    found = load("mdm_robustness")
    keys = [key for key in found["rows"][0] if key not in ("arm", "valid")]
    lines = [" | ".join([row["arm"], *(_cell(row.get(key)) for key in keys)]) for row in found["rows"]]
    model = found["config"]["model"]
    return [
        *paragraph(
            f"{_sizes(found)}; base {BASES[model['base']['name']]}, weight {model['weight']:g} without a search. The",
            f"metric is {METRICS[found['metric']]}. {setting(found)}.",
        ),
        *table(" | ".join([f"test {found['metric']}", *keys]), lines),
    ]


def quirks(file: str) -> list[str]:
    """What each quirk of MIRD's public code changes, on the data of the analysis."""
    found = load(file)
    metric, lines = found["metric"], []
    bounds = "club" in found["rows"][0]  # whether the model has upper bounds
    for row in found["rows"]:
        arm = f"`{row['arm']}`" if row["arm"] not in ("none", "all") else row["arm"]
        change = "" if row["arm"] == "none" else _gain(row["difference"])
        lines.append(" | ".join([arm, _cell(row[metric]), change, *([_cell(row["club"])] if bounds else [])]))
    idle = "; ".join(f"`{quirk}` ({reason})" for quirk, reason in found["without_effect"].items())
    return [
        *paragraph(
            f"{_sizes(found)}. Differences are paired by seed.",
            *(["CLUB is the sum over all pairs on validation rows, in nats."] if bounds else []),
            f"{setting(found)}.",
        ),
        *table(f"quirk | test {metric} | difference{' | CLUB' if bounds else ''}", lines),
        *(paragraph(f"Without effect on this data: {idle}.") if idle else []),
    ]


def systems(system: str) -> list[str]:
    """One table per data set whose runs are all there and one row per arm: the metric, the gain of the system over the
    arm, and the metric with each modality missing; names the other data sets."""
    from .systems_evidence import CASES

    lines, summary = [], load("systems_evidence")["summary"]
    cases = [case for case in CASES if case.startswith(f"{system}-")]
    for case in (case for case in cases if case in summary):
        found = summary[case]
        metric, names = found["metric"], list(found["rows"][0]["missing"])
        rows = []
        for row in found["rows"]:
            gains = _gain(row["reference_gains"]) if "reference_gains" in row else ""
            missing = [_cell(row["missing"].get(name)) for name in names]
            rows.append(" | ".join([row["arm"], _cell(row["test"][metric]), gains, *missing]))
            alone = {f"{row['arm']}, {name} alone": value for name, value in row["alone"].items()}
            rows += [" | ".join([name, _cell(value), "", *("" for _ in names)]) for name, value in alone.items()]
        gain = f"gain of {found['reference']} over it"
        header = ["arm", f"test {metric}", gain, *(f"{name} missing" for name in names)]
        seeds = found["rows"][0]["seeds"]
        lines += [
            *paragraph(f"{DATA[case.partition('-')[2]]}, {seeds} seeds."),
            *table(" | ".join(header), rows),
        ]
    return lines + _unfinished(DATA[case.partition("-")[2]] for case in cases if case not in summary)


SWAP = {
    "digit_of_F_y": "the picture shows the digit of F_y's row",
    "digit_of_F_m": "the picture shows the digit of F_m's row",
    "style_of_F_m": "the picture has the brightness of F_m's row",
    "probe_on_real": "accuracy of the digit classifier on real pictures",
    "head": "accuracy of the model's own prediction",
}


def _number(row: Row, name: str) -> str:
    return _cell(None if row.get(name) is None else {"mean": row[name], "deviation": row[f"{name}_sd"]})


def mfm() -> list[str]:
    """The three analyses on data whose factors are known."""
    swap, missing, interpretation = (load(f"mfm_{name}")["rows"] for name in ("swap", "missing", "interpretation"))
    columns = {"both": "both pictures", "missing": "second missing", "error": "squared error of the second picture"}
    known = {"share_where_shown": "share of the gradient where the label is visible", "hsic_ratio": "HSIC ratio"}
    lines = [f"{label} | {_number(swap[0], name)}" for name, label in SWAP.items()]
    return [
        *table("pictures decoded from F_y of one row and F_m of another | share of rows", lines),
        *table(
            " | ".join(["test accuracy", *columns.values()]),
            (" | ".join([row["model"], *(_number(row, name) for name in columns)]) for row in missing),
        ),
        *table(
            " | ".join(["modality (its label is visible early, late or never)", *known.values()]),
            (" | ".join([row["modality"], *(_number(row, name) for name in known)]) for row in interpretation),
        ),
    ]
