"""Estimate mutual information with a confidence interval, and plot the estimates over the truth.

    python examples/estimate_mi.py --out mi.png

Here the truth is known: x and y are Gaussians of three dimensions, with different numbers of samples. For your own
data, x [N, Dx] and y [N, Dy], just call `mk.estimate_mi(x, y)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import mi_kernels as mk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", type=float, nargs="+", default=[0.0, 1.0, 2.0], help="nats")
    parser.add_argument("--samples", type=int, nargs="+", default=[400, 2000])
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("mi.png"))
    options = parser.parse_args()

    axes = Figure(figsize=(5, 4), layout="constrained").add_subplot()
    axes.axline((0, 0), slope=1, color="gray", linewidth=1, label="truth")
    for k, samples in enumerate(options.samples):
        found = []
        for truth in options.truths:
            x, y = mk.tasks.gaussian(truth, 3).sample(samples, 0)
            estimate = mk.estimate_mi(x, y, max_steps=options.max_steps, progress=False)
            low, high = estimate.interval()
            print(f"N {samples:5d}  truth {truth:.2f}  estimate {estimate.value:5.2f}  95 % {low:5.2f} to {high:5.2f}")
            for warning in estimate.warnings:
                print(f"         {warning}")
            found.append(estimate)
        places = [truth + 0.03 * k for truth in options.truths]  # side by side, not on top of each other
        half_widths = [e.interval()[1] - e.value for e in found]
        values = [e.value for e in found]
        axes.errorbar(places, values, half_widths, fmt="o", capsize=3, markersize=4, label=f"N = {samples}")
    axes.set(xlabel="true mutual information, nats", ylabel="estimate with 95 % interval, nats")
    axes.legend()
    axes.figure.savefig(options.out, dpi=150)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
