"""Helpers for the measured sections of the pages: load results by name, format Markdown paragraphs and tables."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import Any

from . import machine


def load(name: str) -> dict[str, Any]:
    return json.loads((machine.RESULTS / f"{name}.json").read_text())


def setting(result: dict[str, Any]) -> str:
    m = result["machine"]
    peak = m.get("fp32_peak_gflops")
    rate = f" (fp32 peak {peak:.0f} GFLOP/s)" if peak else ""
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    return f"{threads} of an {m['processor']}{rate}, torch {m['torch']}, commit {m['commit']}, {m['date']}"


def paragraph(*text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text), 120, break_long_words=False, break_on_hyphens=False), ""]


def table(header: str, lines: Iterable[str]) -> list[str]:
    return [f"| {header} |", "|" + "---|" * (header.count("|") + 1), *(f"| {line} |" for line in lines), ""]
