"""MIRD: mutual-information regularised disentanglement with one modality-agnostic code (arXiv 2409.12408)."""

from models.mird.config import LADDER, QUIRKS, Settings
from models.mird.model import MIRD, build

__all__ = ["LADDER", "MIRD", "QUIRKS", "Settings", "build"]
