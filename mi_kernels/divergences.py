"""Alias of `mi_kernels.losses.divergences`, kept for existing imports."""

from .losses.divergences import gaussian_mmd, hsic, median_distance, mmd

__all__ = ["gaussian_mmd", "hsic", "median_distance", "mmd"]
