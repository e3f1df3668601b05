"""Alias of `mi_kernels.bounds.club`, kept for existing imports."""

from .bounds.club import CLUB, CLUBCategorical, CLUBMean, CLUBSample

__all__ = ["CLUB", "CLUBCategorical", "CLUBMean", "CLUBSample"]
