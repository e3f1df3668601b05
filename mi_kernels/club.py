"""The former path of `mi_kernels.bounds.club`, kept so that imports of it work."""

from .bounds.club import CLUB, CLUBCategorical, CLUBMean, CLUBSample

__all__ = ["CLUB", "CLUBCategorical", "CLUBMean", "CLUBSample"]
