"""Compares AVX-512 and AVX2 on one machine: our time over that of the plain torch definition, in both configurations.

    python -m bench.instructions [--seconds 3]      writes bench/results/cpu_instructions.json

The AVX2 configuration uses torch's AVX2 kernels (ATEN_CPU_CAPABILITY), the AVX2 code of MKL and oneDNN
(MKL_ENABLE_INSTRUCTIONS, ONEDNN_MAX_CPU_ISA), and our own product loops (MI_KERNELS_PLAIN_GEMM). Our elementwise loops
still use AVX-512, so this only approximates an AVX2 processor. Needs a CPU with AVX-512 and a quiet machine; takes two
minutes.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from . import compare, machine, suite

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MI_KERNELS_PLAIN_GEMM": "1",
}
CASES = (
    "loss/info_nce", "loss/info_nce symmetric", "loss/clip_loss", "loss/siglip_loss", "loss/sup_con", "loss/mmd",
    "loss/hsic", "bound/InfoNCE concat", "bound/NWJ dot", "bound/CLUB", "op/attention softmax", "op/lstm",
)  # fmt: skip
NOTE = "milliseconds are medians of turns; over_reference is ours over the plain torch definition in the same turns"


def rows(variables: dict[str, str], label: str, seconds: float) -> list[dict[str, Any]]:
    ours, reference = (
        compare.Side(compare.ROOT, v) for v in (variables, {**variables, "MI_KERNELS_BACKEND": "reference"})
    )
    found = []
    try:
        for case in CASES:
            times = compare.paired(reference, ours, case, seconds, 10)
            if isinstance(times, str):
                raise SystemExit(f"bench.instructions: {case}: {times}")
            ratios = [b / a for a, b in zip(*times, strict=True)]
            middle, low, high = machine.quantiles(ratios)
            row = {"case": case, "instructions": label, "milliseconds": round(1e3 * statistics.median(times[1]), 4)}
            found.append(row | {"over_reference": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]})
            print(found[-1], flush=True)
    finally:
        for side in (ours, reference):
            side.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="a case and instruction set")
    args = parser.parse_args()
    assert set(CASES) <= set(suite.cases())
    if machine.describe()["capability"] != "AVX512":
        raise SystemExit(
            f"bench.instructions needs a CPU with AVX-512, this one has {machine.describe()['capability']}"
        )
    found = rows({}, "AVX-512", args.seconds) + rows(AVX2, "AVX2 switches", args.seconds)
    print(machine.write("cpu_instructions", found, NOTE))


if __name__ == "__main__":
    main()
