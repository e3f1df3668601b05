"""MFM: learning factorized multimodal representations (Tsai et al., ICLR 2019, arXiv 1806.06176)."""

from models.mfm.config import Settings
from models.mfm.model import MFM, build

__all__ = ["MFM", "Settings", "build"]
