"""Data sources: each returns a PairedData."""

from models.data.base import SPLITS, Batch, Inputs, Modality, PairedData
from models.data.digits import load_digits
from models.data.npz import load_npz
from models.data.synthetic import generate
from models.data.utd_mhad import load_utd_mhad

__all__ = [
    "SPLITS",
    "Batch",
    "Inputs",
    "Modality",
    "PairedData",
    "load",
    "load_digits",
    "load_npz",
    "load_utd_mhad",
    "generate",
]


def load(source: str, seed: int = 0, modalities: tuple[str, str] | None = None) -> PairedData:
    """``digits``, ``synthetic``, ``utd-mhad`` or the path of an ``.npz`` file."""
    if source == "digits":
        return load_digits(seed)
    if source == "synthetic":
        return generate(seed=seed)
    if source == "utd-mhad":
        return load_utd_mhad()
    if source.endswith(".npz"):
        return load_npz(source, seed, modalities)
    raise ValueError(f"data must be digits, synthetic, utd-mhad or a file that ends in .npz; got {source!r}")
