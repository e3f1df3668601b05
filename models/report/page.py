"""The template of the page: HTML sections and one style for light and dark mode, without external resources."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from models.batch import Target
from models.evaluation.summary import best_rows, shown, with_deviation
from models.report.figures import colour
from models.report.speed import Seconds

STYLE = """:root{color-scheme:light dark;--ink:#1f2328;--soft:#626a73;--line:#d8dee4;--mark:#e7f1fb;--page:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa4ae;--line:#3a424b;--mark:#1d3146;--page:#14181d}}
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:1.5em auto;padding:0 1em;color:var(--ink);
background:var(--page)}h1{font-size:1.5em;line-height:1.25}h2{font-size:1.15em;margin-top:2em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92em}td,th{padding:.3em .8em;
border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th{color:var(--soft);font-weight:600}
td.t,th.t{text-align:left}tr.best{background:var(--mark);font-weight:600}
.figures{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;flex:1 1 300px;max-width:460px}
figure svg{width:100%;height:auto;color:var(--ink)}.note{color:var(--soft);font-size:.92em}
.legend{display:flex;flex-wrap:wrap;gap:.2em 1em;font-size:.9em;margin:.5em 0}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.35em}
@media (max-width:600px){table{font-size:.82em}td,th{padding:.3em .45em}}
details pre{overflow-x:auto;font-size:.85em}ul{padding-left:1.2em}"""


def text(value: Any) -> str:
    return html.escape(str(value))


def cells(values: Sequence[Any], kind: str = "td", left: int = 1) -> str:
    """Cells of a row, the first ``left`` of them set to the left."""
    return "".join(
        f"<{kind}{' class=t' if index < left else ''}>{text(value)}</{kind}>" for index, value in enumerate(values)
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1, best: Sequence[int] = ()) -> str:
    lines = [f"<tr>{cells(header, 'th', left)}</tr>"]
    for index, row in enumerate(rows):
        mark = ' class="best"' if index in best else ""
        lines.append(f"<tr{mark}>{cells(row, 'td', left)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def scores(summary: Sequence[dict[str, Any]]) -> str:
    """The best row is marked; the primary metric comes with its deviation."""
    if not summary:
        return ""
    metric = summary[0]["metric"]
    others = [name for name in summary[0]["metrics"] if name != metric]
    rows = []
    for row in summary:
        values = [row["metrics"].get(name) for name in others]
        rows.append(
            [
                row["model"],
                row["representation"],
                with_deviation(row["mean"], row["deviation"], row["seeds"]),
                *("" if value is None else shown(value["mean"]) for value in values),
                row["seeds"],
            ]
        )
    header = ["model", "representation", f"test {metric}", *(name.replace("_", " ") for name in others), "seeds"]
    return table(header, rows, 2, best_rows(summary)[:1])


def class_legend(target: Target) -> str:
    if not target.is_classes:
        return ""
    names = target.names or tuple(str(index) for index in range(target.size))
    chips = (
        f'<span><i style="background:{colour(index, target.size)}"></i>{text(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(chips)}</div>'


def missing(found: Mapping[str, Mapping[str, str]]) -> str:
    """{model: {condition: value}} as a table."""
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    return table(["model", *columns], [[model, *(row.get(c, "") for c in columns)] for model, row in found.items()])


def speed(found: Mapping[str, Mapping[str, Seconds]]) -> str:
    backends = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = []
    for model, row in found.items():
        shown = [f"{row[b].median * 1e3:.1f} ({row[b].low * 1e3:.1f}-{row[b].high * 1e3:.1f})" for b in backends]
        rows.append([model, *shown, f"{row[backends[0]].median / row[backends[-1]].median:.2f}x"])
    return table(["model", *(f"{b}, ms" for b in backends), f"{backends[-1]} against {backends[0]}"], rows)


def figures(images: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(images)}</div>'


def section(title: str, body: str, note: str = "") -> str:
    return f"<h2>{text(title)}</h2>{body}" + (f'<p class="note">{note}</p>' if note else "") if body else ""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{text(title)}</title>
<style>{STYLE}</style></head><body><h1>{text(title)}</h1><p>{lead}</p>{"".join(sections)}</body></html>
"""
