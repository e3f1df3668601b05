"""The former path of `mi_kernels.bounds.density`, kept so that imports of it work."""

from .bounds.density import BarberAgakov, GaussianConditional, LeaveOneOut, VariationalUpperBound, gaussian_entropy

__all__ = ["BarberAgakov", "GaussianConditional", "LeaveOneOut", "VariationalUpperBound", "gaussian_entropy"]
