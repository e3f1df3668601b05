"""FactorCL on your own arrays: arrays -> .npz -> fit -> linear probe.

    python examples/factorcl_own_data.py --out runs/own

Run it from a checkout, because models/ is not part of the installed package. The arrays here are synthetic: two
modalities share one bit, each has one bit of its own, and the label combines the three bits (eight classes). The bits
are signs of products, so no linear model of the inputs can predict them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where models/ lies

from models.evaluation.runs import evaluate_run
from models.evaluation.summary import summarise, table
from models.settings import parse_changes, starting_point
from models.training.fit import fit, load_data


def arrays(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One array per modality, [N, D] (or [N, T, D] for sequences); labels `y`; optionally `split`: 0, 1, 2 for
    training, validation and test rows. Without `split` the rows are split at random."""
    random = np.random.default_rng(seed)
    shared, left, right = random.integers(0, 2, (3, rows))

    def view(*bits: np.ndarray) -> np.ndarray:
        # A bit is the sign of the product of two directions.
        signs = random.choice([-1.0, 1.0], (rows, len(bits)))
        codes = np.concatenate([signs, signs * (2 * np.stack(bits, 1) - 1)], 1)
        mixed = codes @ np.random.default_rng(len(bits)).normal(size=(codes.shape[1], 24))
        return (mixed + 0.3 * random.normal(size=mixed.shape)).astype(np.float32)

    return {"camera": view(shared, left), "sensor": view(shared, right), "y": shared + 2 * left + 4 * right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / "own.npz"
    np.savez(data, **arrays(options.rows))

    # The same as: python -m models fit --model factorcl-sup --data runs/own/own.npz --set ... --out runs/own/fit
    config = starting_point("factorcl-sup", str(data)).changed(
        parse_changes(
            [
                "model.critic=cosine",
                "model.club_floor=0",
                "model.encoder.hidden=64",
                "model.encoder.out_dim=32",
                f"training.epochs={options.epochs}",
                "training.batch_size=128",
                "training.lr=0.002",
            ]
        )
    )
    folder = options.out / "fit"
    fit(config, load_data(config), folder, overwrite=True, progress=False)
    # Test accuracy of linear probes, a constant prediction, a linear model of the inputs and untrained encoders.
    print(table(summarise([evaluate_run(folder)])))
    print(f"the run is {folder}; its report: python -m models report --out {folder}")


if __name__ == "__main__":
    main()
