"""Chooses the Triton schedule of a one-sided loss with 16- or 32-bit features: "fused" or "stored".

routes.json holds an ordered list of rules. The first rule that applies decides, and each rule names its source. A rule
may have the conditions `architecture` (compute capability), `dtype`, and inclusive bounds `pairs_at_least`,
`pairs_at_most` (B N), `features_at_least` and `features_at_most` (D). MI_KERNELS_SCHEDULE=fused|stored overrides all
rules. `python -m bench.route` measures both schedules on the device and rewrites the rules for it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..common.schedules import SCHEDULES, named_schedule

PATH = Path(__file__).with_name("routes.json")
_BOUNDS = {f"{what}_at_{side}" for what in ("pairs", "features") for side in ("least", "most")}
KEYS = {"architecture", "dtype", "schedule", "source", *_BOUNDS}
Rule = dict[str, Any]


def load(path: Path = PATH) -> list[Rule]:
    """Reads the rules. Raises ValueError if a rule is malformed or the last rule does not apply to all cases."""
    rules = json.loads(path.read_text())["rules"]
    for rule in rules:
        if unknown := set(rule) - KEYS:
            raise ValueError(f"{path.name}: unknown keys {sorted(unknown)} in {rule}")
        if rule.get("schedule") not in SCHEDULES or not rule.get("source"):
            raise ValueError(f"{path.name}: a rule needs a schedule of {SCHEDULES} and a source, got {rule}")
    if not rules or any(rules[-1].get(key) is not None for key in KEYS - {"schedule", "source"}):
        raise ValueError(f"{path.name}: the last rule must apply to all cases")
    return rules


@functools.cache
def _rules() -> list[Rule]:
    return load()


def holds(rule: Rule, dtype: str, pairs: int, features: int, architecture: tuple[int, int] | None) -> bool:
    if rule.get("architecture") is not None and tuple(rule["architecture"]) != architecture:
        return False
    if rule.get("dtype") is not None and rule["dtype"] != dtype:
        return False
    for name, value in (("pairs", pairs), ("features", features)):
        low, high = rule.get(f"{name}_at_least"), rule.get(f"{name}_at_most")
        if (low is not None and value < low) or (high is not None and value > high):
            return False
    return True


def choose(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    features: int,
    architecture: tuple[int, int] | None,
    rules: list[Rule] | None = None,
) -> str:
    """The schedule for B = rows, N = columns and D = features on a compute capability (None: not a GPU)."""
    if named := named_schedule():
        return named
    name = str(dtype).removeprefix("torch.")
    for rule in rules if rules is not None else _rules():
        if holds(rule, name, rows * columns, features, architecture):
            return rule["schedule"]
    raise AssertionError("the last rule applies to all cases")


@functools.cache
def architecture(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
