"""Fused contrastive losses, mutual-information bounds and estimates that never store the B x B score matrix."""

from . import compat, distributed, tasks
from .backends import backends, use_backend
from .bounds import (
    CLUB,
    MINE,
    NCECLUB,
    NWJ,
    SMILE,
    TUBA,
    BarberAgakov,
    CLUBCategorical,
    CLUBMean,
    CLUBSample,
    DonskerVaradhan,
    InfoNCE,
    InterpolatedBound,
    JensenShannon,
    JointCritic,
    LeaveOneOut,
    TotalCorrelation,
    VariationalUpperBound,
    WassersteinDependency,
)
from .critics import BilinearCritic, ConcatCritic, DotCritic, SeparableCritic
from .estimate import MIEstimate, estimate_mi
from .losses import clip_loss, gaussian_mmd, hsic, info_nce, mmd, nt_xent, siglip_loss, sup_con
from .memory_bank import MemoryBank
from .ops.common import compiler
from .ops.cross_attention.api import cross_attention, cross_attention_grouped
from .ops.lstm_scan.api import lstm, lstm_decode, lstm_scan

compiler.prepare()

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
