"""Critics: modules that score all pairs of a batch and return statistics of the score matrix to the bounds."""

from .base import Critic
from .concat import ConcatCritic
from .inner_product import BilinearCritic, DotCritic, InnerProductCritic, SeparableCritic
from .layers import MLP, GroupedLinear

__all__ = [
    "MLP",
    "BilinearCritic",
    "ConcatCritic",
    "Critic",
    "DotCritic",
    "GroupedLinear",
    "InnerProductCritic",
    "SeparableCritic",
]
