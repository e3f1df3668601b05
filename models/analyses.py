"""Analyses of single systems, by name: ``python -m models analyse NAME --out DIR``. To add an analysis, add a line
here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.data.formats.checks import suggestion
from models.factorcl import analyses as factorcl
from models.factorcl import probe
from models.mdm import analyses as mdm
from models.mfm import analyses as mfm
from models.mird import analyses as mird

# Each function writes NAME.json and NAME.svg into the folder and returns a line or a table with its results.
ANALYSES: dict[str, Callable[[Path, bool], str]] = {
    "factorcl-gaussian": factorcl.gaussian,
    "factorcl-cmi": factorcl.conditional,
    "factorcl-information": probe.information,
    "mdm-critic": mdm.critic,
    "mdm-robustness": mdm.robustness,
    "mird-quirks": mird.quirks,
    "mfm-interpretation": mfm.interpretation,
    "mfm-swap": mfm.swap,
    "mfm-missing": mfm.missing,
}


def analyse(name: str, out: Path, quick: bool = False) -> str:
    """Runs an analysis. ``quick`` takes few steps, only to check that it runs. Raises ValueError that lists the known
    names."""
    if name not in ANALYSES:
        raise ValueError(f"the analysis must be one of {', '.join(ANALYSES)}; got {name!r}{suggestion(name, ANALYSES)}")
    out.mkdir(parents=True, exist_ok=True)
    return ANALYSES[name](out, quick)
