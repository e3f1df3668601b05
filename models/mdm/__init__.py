"""Mutual dependency maximisation (Colombo et al., EMNLP 2021): a penalty on any model with a fused representation."""

from models.mdm.config import Settings
from models.mdm.model import MDM, build

__all__ = ["MDM", "Settings", "build"]
