"""The former path of `mi_kernels.losses.divergences`, kept so that imports of it work."""

from .losses.divergences import gaussian_mmd, hsic, median_distance, mmd

__all__ = ["gaussian_mmd", "hsic", "median_distance", "mmd"]
