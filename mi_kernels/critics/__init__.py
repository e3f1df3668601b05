"""Critics: modules that score every pair of a batch, and give a bound the statistics of those scores."""

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
