"""Times the drop-ins of mi_kernels.compat and their originals: `python -m bench.dropins --out FILE [--batches 16 ...]`.

One step computes the value and all gradients. Original and drop-in alternate, and the ratio ours / theirs is the median
over the turns with a bootstrap interval; below 1 the drop-in is faster. Rows are written immediately, and a second run
with the same FILE continues where the first one stopped.

Installed libraries are imported. Code that is published without a package is read from a folder:
`--source supcontrast=DIR --source club=DIR --source smile=DIR --source factorcl=DIR`. Missing originals are skipped.

Time originals that take seconds or gigabytes at large batches separately, with fewer turns:
`--only "PML NTXent" --batches 256 1024 --turns 5`, and concat critics, whose originals store several [B, B, hidden]
tensors (1 GB each for FactorCL's at B = 1024), `--only CLUB --batches 1024 --most-pairs 1024 --turns 5`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_kernels import compat
from models.provenance import describe

from . import machine

BATCHES = (16, 32, 64, 128, 256, 1024)
WIDTH = 128
# The file in each source folder that defines the replaced classes.
FILES = {
    "supcontrast": ("losses.py",),
    "club": ("mi_estimators.py",),
    "smile": ("utils.py", "estimators.py"),
    "factorcl": ("critic_objectives.py",),
}
RANDOM = ("MINE", "CLUBSample", "bank")  # these draw random numbers, so values differ between calls
TURNS = 15  # least number of turns of every pair
MOST_PAIRS = 256  # the originals of concat critics store several [B, B, hidden] tensors
Case = tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def from_folder(folder: Path, file: str) -> ModuleType:
    """A module of a folder under a name of its own; it may import its neighbours."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"original_{folder.name}_{Path(file).stem}", folder / file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


def leaf(*shape: int, unit: bool = False) -> Tensor:
    t = torch.randn(*shape)
    return (F.normalize(t, dim=-1) if unit else t).requires_grad_()


def alike(theirs: torch.nn.Module, ours: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Both with the weights of the first."""
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def packaged(batch: int) -> Iterator[Case]:
    a, b, u, v = leaf(batch, WIDTH), leaf(batch, WIDTH), leaf(batch, WIDTH, unit=True), leaf(batch, WIDTH, unit=True)
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    labels = torch.randint(0, max(2, batch // 8), (batch,))
    if module := installed("info_nce"):
        theirs, ours = module.InfoNCE, compat.info_nce.InfoNCE
        yield "info_nce", theirs(), ours(), (a, b)
        yield "info_nce, rows", theirs(reduction="none"), ours(reduction="none"), (a, b)
        yield "info_nce, unpaired", theirs(), ours(), (a, b, leaf(4 * batch, WIDTH))
        paired = {"negative_mode": "paired"}
        yield "info_nce, paired", theirs(**paired), ours(**paired), (a, b, leaf(batch, 32, WIDTH))
    if module := installed("open_clip.loss"):
        ours = compat.open_clip
        yield "open_clip ClipLoss", module.ClipLoss(), ours.ClipLoss(), (u, v, scale)
        yield "open_clip SigLipLoss", module.SigLipLoss(), ours.SigLipLoss(), (u, v, scale, bias)
        taught = (u, v, scale, v.detach(), u.detach(), torch.tensor(20.0))
        yield "open_clip DistillClipLoss", module.DistillClipLoss(), ours.DistillClipLoss(), taught
    if module := installed("lightly.loss"):
        for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
            yield f"lightly {name}", getattr(module, name)(), getattr(compat.lightly, name)(), (a, b)
        size = (0.1, (4096, WIDTH))
        yield "lightly NTXentLoss, bank", module.NTXentLoss(*size), compat.lightly.NTXentLoss(*size), (a, b)
    if module := installed("pytorch_metric_learning.losses"):
        ours = compat.pytorch_metric_learning.losses
        for name in ("NTXentLoss", "SupConLoss"):
            yield f"PML {name}", getattr(module, name)(0.1), getattr(ours, name)(0.1), (a, labels)


def sourced(batch: int, folders: dict[str, Path], most_pairs: int = MOST_PAIRS) -> Iterator[Case]:
    found = {name: [from_folder(folder, file) for file in FILES[name]] for name, folder in folders.items()}
    x, y, labels = leaf(batch, 32), leaf(batch, 32), torch.randint(0, 10, (batch,))
    if modules := found.get("supcontrast"):
        theirs, ours, views = modules[0].SupConLoss(), compat.supcontrast.SupConLoss(), leaf(batch, 2, WIDTH, unit=True)
        yield "SupContrast, labels", theirs, ours, (views, labels)
        yield "SupContrast, SimCLR", theirs, ours, (views,)
        mask = (labels[:, None] == labels).float()
        yield "SupContrast, mask", *(lambda f, m, loss=k: loss(f, mask=m) for k in (theirs, ours)), (views, mask)
    if batch > most_pairs:
        return
    if modules := found.get("club"):
        for name in ("CLUB", "CLUBMean", "CLUBSample", "NWJ", "InfoNCE", "MINE", "VarUB"):
            pair = alike(*(getattr(m, name)(32, 32, 64) for m in (modules[0], compat.club)))
            yield f"CLUB {name}", *pair, (x, y)
    if modules := found.get("factorcl"):
        for name in ("InfoNCECritic", "CLUBInfoNCECritic"):
            pair = alike(*(getattr(m, name)(32, 32, 256, 1, "relu") for m in (modules[0], compat.factorcl)))
            yield f"FactorCL {name}", *pair, (x, y)
    if modules := found.get("smile"):
        utils, estimators = modules
        for name, sizes in (("ConcatCritic", (32, 256, 2, "relu")), ("SeparableCritic", (32, 256, 32, 2, "relu"))):
            critics = alike(getattr(utils, name)(*sizes), getattr(compat.smile, name)(*sizes))
            bounds = estimators.infonce_lower_bound, compat.smile.infonce_lower_bound
            steps = [lambda s, t, f=f, c=c: f(c(s, t)) for f, c in zip(bounds, critics, strict=True)]
            yield f"SMILE {name}", *steps, (x, y)


def step(loss: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    value = loss(*inputs)
    value = sum(value) if isinstance(value, tuple) else value.sum()
    value.backward()
    for t in inputs:
        t.grad = None
    return float(value.detach())


def in_turns(case: Case, seconds: float, turns: int = TURNS) -> tuple[list[float], list[float]]:
    """Times of theirs and ours; of this thread alone where it is the only one, since others may use the machine."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    step(case[1], case[3])
    steps = max(1, int(2e-3 / (time.perf_counter() - start)))  # of a turn: one alone would meet cold caches
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < turns:
        for loss, kept in zip(case[1:3], times, strict=True):
            start = clock()
            for _ in range(steps):
                step(loss, case[3])
            kept.append((clock() - start) / steps)
    return times


def interval(ratios: list[float], draws: int = 400) -> tuple[float, float]:
    """95 % of the medians of samples drawn with replacement."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], medians[-1 - draws // 40]


def measured(case: Case, batch: int, seconds: float, turns: int = TURNS) -> dict[str, Any]:
    name, theirs, ours, inputs = case
    values = [step(loss, inputs) for loss in (theirs, ours)]
    drawn = any(word in name for word in RANDOM)
    if not drawn and abs(values[0] - values[1]) > 1e-3 * max(1.0, abs(values[0])):
        return {"loss": name, "batch": batch, "values": values, "note": "values differ: not timed"}
    for loss in (theirs, ours):
        step(loss, inputs)
    before, after = in_turns(case, seconds, turns)
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return {
        "loss": name,
        "batch": batch,
        "theirs_microseconds": round(1e6 * statistics.median(before), 1),
        "ours_microseconds": round(1e6 * statistics.median(after), 1),
        "ours_over_theirs": round(statistics.median(ratios), 3),
        "interval": [round(bound, 3) for bound in interval(ratios)],
        "fastest_over_fastest": round(min(after) / min(before), 3),
        "turns": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of the rows, read first if it exists")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=1.0, help="of every pair")
    parser.add_argument("--turns", type=int, default=TURNS, help="of every pair, at least")
    parser.add_argument("--most-pairs", type=int, default=MOST_PAIRS, help="the largest batch of concat critics")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=DIR", help=f"{', '.join(FILES)}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    folders = {name: Path(path) for name, _, path in (text.partition("=") for text in args.source)}
    if unknown := set(folders) - set(FILES):
        parser.error(f"--source must name one of {', '.join(FILES)}, got {', '.join(sorted(unknown))}")
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for batch in args.batches:
        torch.manual_seed(0)
        for case in (*packaged(batch), *sourced(batch, folders, args.most_pairs)):
            if args.only not in case[0] or any((r["loss"], r["batch"]) == (case[0], batch) for r in rows):
                continue
            rows.append(measured(case, batch, args.seconds, args.turns))
            print(json.dumps(rows[-1]), flush=True)
            machine.save(args.out, {"machine": describe(), "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
