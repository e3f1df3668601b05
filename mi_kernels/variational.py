"""Alias of `mi_kernels.bounds.density`, kept for existing imports."""

from .bounds.density import BarberAgakov, GaussianConditional, LeaveOneOut, VariationalUpperBound, gaussian_entropy

__all__ = ["BarberAgakov", "GaussianConditional", "LeaveOneOut", "VariationalUpperBound", "gaussian_entropy"]
