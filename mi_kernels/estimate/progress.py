"""A progress bar: tqdm's if it is installed, otherwise an occasional line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Progress:
    """Shows the progress of consecutive fits; silent if `shown` is False."""

    def __init__(self, shown: bool, max_steps: int):
        self.shown, self.max_steps = shown, max_steps

    def member(self, name: str) -> tuple[Callable[[int, float], None], Callable[[], None]]:
        """Returns a function that reports (step, score) of one fit, and a function that closes the bar."""
        if not self.shown:
            return lambda step, score: None, lambda: None
        try:
            from tqdm import tqdm
        except ImportError:
            return self._plain(name), lambda: None
        bar = tqdm(total=self.max_steps, desc=name, unit="step", leave=False)

        def report(step: int, score: float) -> None:
            bar.set_postfix_str(f"validation {score:.4f}", refresh=False)
            bar.update(step - bar.n)

        return report, bar.close

    def _plain(self, name: str) -> Callable[[int, float], None]:
        def report(step: int, score: float) -> None:
            if step % 500 == 0 or step == self.max_steps:
                print(f"{name}: step {step} of {self.max_steps}, validation {score:.4f}", file=sys.stderr)

        return report
