"""Define your own bound in ten lines, and compare its estimate with those of the package's bounds.

    python examples/own_bound.py

ReMINE (Choi and Lee 2020) is Donsker-Varadhan with a penalty against drift of the critic. T and T + c give the same
value, and a penalty on log E_Q[exp T] fixes c. The statistics of the scores come from the fused critic; nothing else is
needed.
"""

from __future__ import annotations

import argparse

import mi_kernels as mk
from mi_kernels.bounds import DonskerVaradhan
from mi_kernels.bounds.base import log_mean_exp
from mi_kernels.bounds.registry import declare


@declare("remine", kind="lower", value="as dv, trained with a penalty on log E_Q[exp T]", negatives="off the diagonal")
class ReMINE(DonskerVaradhan):
    """The value is that of Donsker-Varadhan; the penalty is used only to train the critic."""

    def learning_loss(self, x, y):
        (row_lse,) = self.off_diagonal(x, y, "row_lse")
        n = x.shape[-2]
        return super().learning_loss(x, y) + 0.1 * log_mean_exp(row_lse, n * (n - 1)).square()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=float, default=1.0, help="nats")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--max-steps", type=int, default=300)
    options = parser.parse_args()
    x, y = mk.tasks.gaussian(options.truth, 3).sample(options.samples, 0)
    for estimator in ("remine", "dv", "infonce"):
        found = mk.estimate_mi(x, y, estimator=estimator, max_steps=options.max_steps, progress=False)
        print(f"{estimator:8s} truth {options.truth:.2f}  {found}")


if __name__ == "__main__":
    main()
