"""Mutual-information losses between batches of representations, fused: no B x B score matrix is ever stored."""

from .backends import backends, use_backend
from .bounds import NCECLUB, InfoNCE
from .club import CLUB, CLUBCategorical, CLUBMean, CLUBSample
from .critics import BilinearCritic, ConcatCritic, DotCritic, SeparableCritic
from .divergences import gaussian_mmd, hsic, mmd
from .functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con
from .variational import BarberAgakov, LeaveOneOut, VariationalUpperBound

__all__ = [
    "CLUB",
    "NCECLUB",
    "BarberAgakov",
    "BilinearCritic",
    "CLUBCategorical",
    "CLUBMean",
    "CLUBSample",
    "ConcatCritic",
    "DotCritic",
    "InfoNCE",
    "LeaveOneOut",
    "SeparableCritic",
    "VariationalUpperBound",
    "backends",
    "clip_loss",
    "gaussian_mmd",
    "hsic",
    "info_nce",
    "mmd",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "use_backend",
]
