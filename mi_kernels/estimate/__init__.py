"""A number with its uncertainty: mutual information estimated on held-out samples."""

from .api import estimate_mi
from .result import MIEstimate

__all__ = ["MIEstimate", "estimate_mi"]
