"""Mutual-information losses between batches of representations, fused: no B x B score matrix is ever stored."""

from . import compat, distributed, tasks
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
from .club import CLUB, CLUBCategorical, CLUBMean, CLUBSample
from .critics import BilinearCritic, ConcatCritic, DotCritic, SeparableCritic
from .divergences import gaussian_mmd, hsic, mmd
from .estimate import MIEstimate, estimate_mi
from .functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con
from .memory_bank import MemoryBank
from .ops.cross_attention.api import cross_attention, cross_attention_grouped
from .ops.lstm_scan.api import lstm, lstm_decode, lstm_scan
from .variational import BarberAgakov, LeaveOneOut, VariationalUpperBound

__all__ = [
    "BarberAgakov",
    "BilinearCritic",
    "CLUB",
    "CLUBCategorical",
    "CLUBMean",
    "CLUBSample",
    "ConcatCritic",
    "DonskerVaradhan",
    "DotCritic",
    "InfoNCE",
    "InterpolatedBound",
    "JensenShannon",
    "JointCritic",
    "LeaveOneOut",
    "MIEstimate",
    "MINE",
    "MemoryBank",
    "NCECLUB",
    "NWJ",
    "SMILE",
    "SeparableCritic",
    "TUBA",
    "TotalCorrelation",
    "VariationalUpperBound",
    "WassersteinDependency",
    "backends",
    "clip_loss",
    "compat",
    "cross_attention",
    "cross_attention_grouped",
    "distributed",
    "estimate_mi",
    "gaussian_mmd",
    "hsic",
    "info_nce",
    "lstm",
    "lstm_decode",
    "lstm_scan",
    "mmd",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "tasks",
    "use_backend",
]
