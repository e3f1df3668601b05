"""Replaces the part of pytorch-metric-learning's `utils` that is about losses."""

from . import distributed

__all__ = ["distributed"]
