"""Mutual-information losses between batches of representations, fused: no B x B score matrix is ever stored."""

from . import tasks
from .backends import backends, use_backend
from .bounds import (
    MINE,
    NCECLUB,
    NWJ,
    SMILE,
    TUBA,
    DonskerVaradhan,
    InfoNCE,
    InterpolatedBound,
    JensenShannon,
    JointCritic,
    TotalCorrelation,
    WassersteinDependency,
)
from .critics import BilinearCritic, ConcatCritic, DotCritic, SeparableCritic
from .estimate import MIEstimate, estimate_mi
from .functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con

__all__ = [
    "MINE",
    "NCECLUB",
    "NWJ",
    "SMILE",
    "TUBA",
    "BilinearCritic",
    "ConcatCritic",
    "DonskerVaradhan",
    "DotCritic",
    "InfoNCE",
    "InterpolatedBound",
    "JensenShannon",
    "JointCritic",
    "MIEstimate",
    "SeparableCritic",
    "TotalCorrelation",
    "WassersteinDependency",
    "backends",
    "clip_loss",
    "estimate_mi",
    "info_nce",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "tasks",
    "use_backend",
]
