"""Tests whether one checkout is slower than another: `python -m bench compare BEFORE [AFTER] [--only loss/ ...]`.

BEFORE and AFTER are commits or folders of checkouts; AFTER is the working tree by default. Each side runs the same
cases (suite.py) in its own process, in alternation: before, after, after, before. A turn takes at least a few
milliseconds, so slow phases of the machine affect both sides. The log ratio of after to before of every pair of turns
is one sample. The confidence interval of the median comes from order statistics (no assumption on the noise), with a
level that holds for all cases together (Bonferroni). A case is slower if the whole interval lies above 1 + threshold.
The exit status is 1 for a regression and 2 if a case does not run after the change.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import machine, suite

ROOT = Path(__file__).resolve().parent.parent
TURN = 0.02  # seconds, at least one step


@dataclass(frozen=True)
class Verdict:
    case: str
    ratio: float  # median of after over before
    low: float
    high: float
    pairs: int
    milliseconds: float  # a step before the change, median
    verdict: str  # "slower", "faster", "same", "unclear"

    def __str__(self) -> str:
        interval = f"[{self.low:.3f}, {self.high:.3f}]"
        return f"{self.case:32s} {self.milliseconds:10.3f} ms  x{self.ratio:.3f} {interval:16s} {self.verdict}"


def median_interval(values: list[float], error: float) -> tuple[float, float]:
    """The interval of the median with confidence of at least 1 - error, from order statistics; infinite with too few
    values.

    The k-th smallest lies above the median with probability P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > error:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)


def judge(case: str, before: list[float], after: list[float], threshold: float, error: float) -> Verdict:
    """The verdict from paired times; `error` is the probability that the interval of this case may miss the median."""
    logs = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    low, high = (math.exp(end) for end in median_interval(logs, error))
    word = "unclear"
    if low > 1 + threshold:
        word = "slower"
    elif high < 1 / (1 + threshold):
        word = "faster"
    elif 1 / (1 + threshold) < low and high < 1 + threshold:
        word = "same"
    ratio = math.exp(statistics.median(logs))
    return Verdict(case, ratio, low, high, len(logs), 1e3 * statistics.median(before), word)


class Side:
    """The process of one checkout, with its own environment variables."""

    def __init__(self, checkout: Path, variables: dict[str, str] | None = None):
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(checkout)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, **(variables or {})},
        )
        if not self.answer().get("ready"):
            raise SystemExit(f"bench compare: the code of {checkout} does not start (its output is above)")

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        return json.loads(line) if line else {"error": "the process ended"}

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(60)


@contextlib.contextmanager
def checkout_of(name: str) -> Iterator[Path]:
    """A folder with the commit and its extension; the folder itself if `name` is a folder."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    refusal = f"{name!r} is neither a folder nor a commit of {ROOT}"
    commit = _git("rev-parse", "--verify", f"{name}^{{commit}}", refusal=refusal)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "checkout"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            _with_extension(tree, commit)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str, refusal: str = "") -> str:
    """What git prints. Ends the program if git fails, with ``refusal`` or with git's own words."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        failed = f"git {' '.join(arguments)} failed: {done.stderr.strip()}"
        raise SystemExit(f"bench compare: {refusal or failed}")
    return done.stdout.strip()


def _with_extension(tree: Path, commit: str) -> None:
    """Uses the extension of this checkout if the C++ code is equal, otherwise builds it (minutes)."""
    built = list((ROOT / "mi_kernels").glob("_C*.so"))
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", "csrc", "setup.py"], cwd=ROOT).returncode == 0
    if same and built:
        shutil.copy(built[0], tree / "mi_kernels")
        return
    print(f"bench compare: building the extension of {commit[:8]}", flush=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode or not list((tree / "mi_kernels").glob("_C*.so")):
        raise SystemExit(f"bench compare: no extension for {commit[:8]}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def paired(before: Side, after: Side, case: str, seconds: float, least: int,
           slow: float = 0.0) -> tuple[list[float], list[float]] | str:  # fmt: skip
    """Seconds per step of both sides, turn by turn, or the reason why there are none. `slow`: artificial slowdown of
    `after`."""
    first = before.ask(prepare=case), after.ask(prepare=case)
    for side, answer in zip(("before", "after"), first, strict=True):
        if "error" in answer:
            return f"{side}: {answer['error']}"
    steps = max(1, round(TURN / max(first[0]["seconds"], 1e-6)))
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < least:
        order = ((0, before), (1, after)) if len(times[0]) % 2 == 0 else ((1, after), (0, before))
        for k, side in order:
            answer = side.ask(run=steps, slow=slow * k)
            if "error" in answer:
                return f"{('before', 'after')[k]}: {answer['error']}"
            times[k].append(answer["seconds"] / steps)
    return times


def compare(before: Path, after: Path, names: list[str], seconds: float, threshold: float,
            confidence: float = 0.95, least: int = 20,
            slow: float = 0.0) -> tuple[list[Verdict], dict[str, str]]:  # fmt: skip
    """The verdicts, and the reasons for cases without one."""
    verdicts, failed = [], {}
    sides = Side(before), Side(after)
    try:
        for case in names:
            found = paired(*sides, case, seconds, least, slow)
            if isinstance(found, str):
                failed[case] = found
                print(f"{case:32s} not compared: {found}", flush=True)
                continue
            verdicts.append(judge(case, *found, threshold, (1 - confidence) / len(names)))
            print(verdicts[-1], flush=True)
    finally:
        for side in sides:
            side.close()
    return verdicts, failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", help="a commit, or the folder of a checkout")
    parser.add_argument("after", nargs="?", default=str(ROOT), help="a commit or folder; by default the working tree")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="cases whose names contain one of these")
    parser.add_argument("--seconds", type=float, default=4.0, help="a case")
    parser.add_argument("--threshold", type=float, default=0.03, help="slowdown that is a regression, 0.03 is 3 %%")
    parser.add_argument("--slow", type=float, default=0.0, metavar="SHARE",
                        help="slow AFTER down by this fraction of a step, to test the detection")  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the verdicts as JSON")


def main(options: argparse.Namespace) -> int:
    try:
        names = suite.chosen(options.only)
    except ValueError as error:
        raise SystemExit(f"bench compare: --only: {error}") from None
    with checkout_of(options.before) as before, checkout_of(options.after) as after:
        verdicts, failed = compare(before, after, names, options.seconds, options.threshold, slow=options.slow)
    slower = [v.case for v in verdicts if v.verdict == "slower"]
    if options.out:
        given = {key: getattr(options, key) for key in ("before", "after", "threshold", "slow")}
        found = {"verdicts": [asdict(v) for v in verdicts], "failed": failed}
        content = {"machine": machine.describe(), **given, **found}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    counts = {word: sum(v.verdict == word for v in verdicts) for word in ("slower", "faster", "same", "unclear")}
    print("bench compare: " + ", ".join(f"{n} {word}" for word, n in counts.items()) + f", {len(failed)} not compared")
    if slower:
        print(f"bench compare: slower: {', '.join(slower)}")
        return 1
    return 2 if any(why.startswith("after") for why in failed.values()) else 0
