"""Results of many small runs in one JSON file, written after every run, so that an interrupted study can continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from models.evaluation import summary
from models.provenance import commit, describe

from . import machine

Scores = Mapping[str, Mapping[str, float]]


class Kept:
    """The results {group: {key: found}} of a study; each is stored with its settings and its commit.

    A run is repeated if its settings differ from the stored ones. Results are kept across commits.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.commit = path, commit()
        old = json.loads(path.read_text()) if path.is_file() else {}
        self.content: dict[str, Any] = {"what": what, "machine": describe(), "summary": {}, "runs": old.get("runs", {})}

    def run(self, group: str, key: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        runs = self.content["runs"].setdefault(group, {})
        plain = json.loads(json.dumps(dict(settings)))
        if key not in runs or runs[key]["settings"] != plain:
            runs[key] = {"settings": plain, "commit": self.commit, "found": make()}
            print(group, key, runs[key]["found"], flush=True)
            self.write()
        return runs[key]["found"]

    def found(self, group: str, keys: Iterable[str]) -> list[Any]:
        runs = self.content["runs"].get(group, {})
        return [runs[key]["found"] for key in keys if key in runs]

    def write(self) -> None:
        machine.save(self.path, self.content)


def mean_and_deviation(values: list[float]) -> str:
    """The text "mean ± deviation" of values over runs."""
    return summary.with_deviation(**summary.moments(values), number=len(values))


def summarised(found: list[Scores]) -> dict[str, str]:
    """{"encoder test": "mean ± deviation", ...} of runs' {part: {split: value}}, and how many there are."""
    parts = [(part, split) for part in found[0] for split in found[0][part]] if found else []
    return {f"{part} {split}": mean_and_deviation([run[part][split] for run in found]) for part, split in parts} | {
        "seeds": str(len(found))
    }
