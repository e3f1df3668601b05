"""Mutual-information losses between batches of representations, fused: no B x B score matrix is ever stored."""

from .backends import backends, use_backend
from .bounds import NCECLUB, InfoNCE
from .critics import BilinearCritic, ConcatCritic, DotCritic, SeparableCritic
from .functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con

__all__ = [
    "NCECLUB",
    "BilinearCritic",
    "ConcatCritic",
    "DotCritic",
    "InfoNCE",
    "SeparableCritic",
    "backends",
    "clip_loss",
    "info_nce",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "use_backend",
]
