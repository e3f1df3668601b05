"""Mutual information with a confidence interval, estimated on held-out samples."""

from .api import estimate_mi
from .result import MIEstimate

__all__ = ["MIEstimate", "estimate_mi"]
